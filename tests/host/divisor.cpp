// x / d and x % d by multiplication are what the machine's division says, at every d's edges.
#include "device/divisor.h"

#include <climits>
#include <initializer_list>

#include "expect.h"

namespace {

long long num_divisions = 0;

void divide(int64_t x, int d) {
    if (x < 0 || x > INT_MAX) return;
    const dso::Divisor divisor(d);
    const int n = static_cast<int>(x);
    EXPECT(n / divisor == n / d && n % divisor == n % d, "%d / %d: %d and %d", n, d, n / divisor, n % divisor);
    ++num_divisions;
}

/// Around multiples of d, where a quotient that is off by one shows.
void divide_by(int d) {
    for (const int64_t multiple :
         {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{INT_MAX} / d / 2, int64_t{INT_MAX} / d}) {
        for (int64_t x = multiple * d - 2; x <= multiple * d + 2; ++x) divide(x, d);
    }
    divide(INT_MAX, d);
}

}  // namespace

int main() {
    for (int d = 1; d <= 20000; ++d) divide_by(d);
    for (int bits = 14; bits < 31; ++bits) {
        for (int d = (1 << bits) - 3; d <= (1 << bits) + 3; ++d) divide_by(d);
    }
    for (int d = INT_MAX - 5; d < INT_MAX; ++d) divide_by(d);
    divide_by(INT_MAX);
    for (int x = 0; x < 3000; ++x) {
        for (int d = 1; d < 200; ++d) divide(x, d);
    }
    const dso::Divisor none(0);  // a number like any other, but nothing is divided by it
    EXPECT(none == 0, "%d", static_cast<int>(none));
    std::printf("%lld divisions\n", num_divisions);
}

// What the host programs share: a check that names what failed, and a count of what held.
#pragma once

#include <cstdio>
#include <cstdlib>

inline long long num_checked = 0;

// Counts a case that holds; ends the program with the values where it does not.
#define EXPECT(condition, ...)                                          \
    do {                                                                \
        ++num_checked;                                                  \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
            std::exit(1);                                               \
        }                                                               \
    } while (0)

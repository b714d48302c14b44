// The producer/consumer protocol of device/pipeline.cuh in thousands of random interleavings: no deadlock, no stage
// overwritten while it is read, no stage read before it is whole. Copies complete late and out of order.
#include "device/pipeline.cuh"

#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "expect.h"

namespace {

std::mt19937 random_source;

int below(int limit) { return static_cast<int>(random_source() % static_cast<unsigned>(limit)); }

// ------------------------------------------------------------------------------------------- warps as fibers

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    std::function<void()> body;
    std::function<bool()> blocked_until;  // empty: ready
    bool done = false;
};

ucontext_t main_context;
Fiber* running = nullptr;

void enter() {
    running->body();
    running->done = true;
    swapcontext(&running->context, &main_context);
}

void yield_until(std::function<bool()> condition) {
    running->blocked_until = std::move(condition);
    swapcontext(&running->context, &main_context);
}

void maybe_yield() {
    if (below(3) == 0) yield_until([] { return true; });
}

// ------------------------------------------------------------------------------------------ barriers, copies

struct Barrier {
    uint32_t num_arrivals, pending;
    int64_t pending_bytes = 0;
    uint64_t num_phases = 0;  // completed

    void complete_if_due() {
        if (pending != 0 || pending_bytes != 0) return;
        pending = num_arrivals;
        ++num_phases;
    }
};

std::map<const uint64_t*, Barrier> barriers;
std::vector<std::function<void()>> copies;  // in flight

void arrive(uint64_t* at) {
    Barrier& barrier = barriers.at(at);
    EXPECT(barrier.pending > 0, "a barrier got more arrivals than it counts");
    --barrier.pending;
    barrier.complete_if_due();
}

}  // namespace

namespace dso::ptx {

void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals) { barriers[barrier] = {num_arrivals, num_arrivals}; }

void mbarrier_arrive(uint64_t* barrier) {
    maybe_yield();
    arrive(barrier);
}

void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t num_bytes) {
    maybe_yield();
    barriers.at(barrier).pending_bytes += num_bytes;
    arrive(barrier);
}

// As the hardware: true once the phase of that parity is over, so that parity 1 of a fresh barrier passes at once.
void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    maybe_yield();
    const auto over = [barrier, parity] { return (barriers.at(barrier).num_phases & 1) != parity; };
    if (!over()) yield_until(over);
}

}  // namespace dso::ptx

namespace {

constexpr uint32_t kCopyBytes = 1024;

/// One CTA's life: `num_warps` consumers of `num_steps` steps through a ring.
template <int kNumStages>
void simulate(int num_warps, int num_steps) {
    barriers.clear();
    copies.clear();
    dso::Pipeline<kNumStages> pipeline;
    // As in the kernel: one arrival with the bytes of two copies, and one of a third, counted as an arrival (cp.async).
    pipeline.init(1 + 1, num_warps);
    int content[kNumStages][3];
    int num_readers[kNumStages] = {};
    for (auto& stage : content) stage[0] = stage[1] = stage[2] = -1;

    std::vector<std::unique_ptr<Fiber>> fibers;
    const auto spawn = [&](std::function<void()> body) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        fiber.body = std::move(body);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &main_context;
        makecontext(&fiber.context, enter, 0);
    };

    const auto write = [&](uint32_t stage, int part, int step) {
        EXPECT(num_readers[stage] == 0, "step %d overwrites stage %u while a warp reads it", step, stage);
        content[stage][part] = step;
    };
    spawn([&] {
        typename dso::Pipeline<kNumStages>::State state;
        for (int step = 0; step < num_steps; ++step, state.advance()) {
            pipeline.acquire(state);
            uint64_t* full = &pipeline.full[state.stage];
            dso::ptx::mbarrier_arrive_expect_tx(full, 2 * kCopyBytes);
            for (int part = 0; part < 2; ++part) {
                copies.push_back([&, full, part, step, stage = state.stage] {
                    write(stage, part, step);
                    barriers.at(full).pending_bytes -= kCopyBytes;
                    barriers.at(full).complete_if_due();
                });
            }
            copies.push_back([&, full, step, stage = state.stage] {
                write(stage, 2, step);
                arrive(full);
            });
        }
    });
    for (int warp = 0; warp < num_warps; ++warp) {
        spawn([&] {
            typename dso::Pipeline<kNumStages>::State state;
            for (int step = 0; step < num_steps; ++step, state.advance()) {
                pipeline.wait(state);
                ++num_readers[state.stage];
                for (int part = 0; part < 3; ++part) {
                    maybe_yield();
                    EXPECT(content[state.stage][part] == step, "step %d finds step %d's data in stage %u", step,
                           content[state.stage][part], state.stage);
                }
                --num_readers[state.stage];
                pipeline.release(state);
            }
        });
    }

    for (;;) {
        std::vector<Fiber*> ready;
        bool all_done = true;
        for (auto& fiber : fibers) {
            all_done &= fiber->done;
            if (!fiber->done && (!fiber->blocked_until || fiber->blocked_until())) ready.push_back(fiber.get());
        }
        if (all_done) break;
        EXPECT(!ready.empty() || !copies.empty(), "deadlock: %d stages, %d warps, %d steps", kNumStages, num_warps,
               num_steps);
        const int choice = below(static_cast<int>(ready.size() + copies.size()));
        if (choice < static_cast<int>(ready.size())) {
            running = ready[choice];
            running->blocked_until = nullptr;
            swapcontext(&main_context, &running->context);
        } else {
            const auto copy = copies.begin() + (choice - static_cast<int>(ready.size()));
            const std::function<void()> complete = *copy;
            copies.erase(copy);
            complete();
        }
    }
    EXPECT(copies.empty(), "copies are in flight when the CTA ends");
}

template <int kNumStages>
long long simulate_all() {
    long long num_runs = 0;
    for (const int num_warps : {1, 4, 8, 12})
        for (int num_steps = 0; num_steps <= 3 * kNumStages + 1; ++num_steps)
            for (int run = 0; run < 10; ++run, ++num_runs) simulate<kNumStages>(num_warps, num_steps);
    return num_runs;
}

/// Two groups that take steps in turn, over tiles of all lengths: each step is one group's, whose own state is then at
/// the stage and phase of that step.
void check_turns() {
    constexpr int kNumStages = 6;
    dso::PipelineState<kNumStages> ring;
    dso::PipelineState<kNumStages, 2> own[2];
    dso::StepsInTurn<2> steps[2]{dso::StepsInTurn<2>(0), dso::StepsInTurn<2>(1)};
    own[1].stage = 1;
    int turn = 0;
    for (int tile = 0; tile < 1000; ++tile) {
        const int num_steps = below(8);
        int left[2] = {steps[0].of_tile(num_steps), steps[1].of_tile(num_steps)};
        EXPECT(left[0] + left[1] == num_steps, "%d + %d of %d steps", left[0], left[1], num_steps);
        for (int step = 0; step < num_steps; ++step, turn ^= 1, ring.advance()) {
            EXPECT(left[turn]-- > 0, "group %d has no step %d of %d", turn, step, num_steps);
            EXPECT(own[turn].stage == ring.stage && own[turn].phase == ring.phase, "group %d is elsewhere", turn);
            own[turn].advance();
        }
    }
}

}  // namespace

int main() {
    check_turns();
    const long long num_runs = simulate_all<1>() + simulate_all<2>() + simulate_all<3>() + simulate_all<4>() +
                               simulate_all<5>() + simulate_all<6>() + simulate_all<8>() + simulate_all<12>();
    std::printf("%lld interleavings, %lld checks\n", num_runs, num_checked);
}

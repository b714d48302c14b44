// The machine that the emulated instructions run on: CUDA threads as fibers, in an order that a seed decides.
//
// A fiber runs until it waits for something, or until it draws a pause at an instruction that others can observe. Then
// the machine goes on with any fiber that is ready, or completes any asynchronous operation, at random. So nothing
// holds but what the program waits for, and one seed always gives one order.
//
// What cannot be right ends the launch with a sentence (`fail`): the launch returns an error, as CUDA does.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include <cuda_runtime.h>

namespace emulator {

struct Thread;
struct Warp;
struct Cta;
struct Cluster;

/// Ends the launch. May be called by fibers and by asynchronous operations.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// The thread that runs; none while an asynchronous operation completes by itself.
extern Thread* current;

/// A number below `limit`, from the seed.
uint32_t draw(uint32_t limit);

// ------------------------------------------------------------------------------------------------ waiting

/// What a thread waits for, for the message in a deadlock: a printf format with up to two numbers.
struct Reason {
    const char* format;
    uint32_t first = 0, second = 0;
};

/// Threads that wait for the same event.
class WaitList {
  public:
    /// Returns after the next `wake`.
    void wait(const Reason& reason);

    /// Returns at once if `is_over`, else after the next `wake`. The lanes of a warp look together, when none of them
    /// can run any more: hardware runs as one the lanes that have not parted, and kernels count on that where all lanes
    /// wait for a phase of an mbarrier and one goes on to what ends the next. Between two such waits lanes drift apart.
    void wait_with_warp(const Reason& reason, std::function<bool()> is_over);

    void wake();

    /// One lane less is ready; if it was the last, those that have come to look do.
    static void look_if_last(Warp& warp);

  private:
    std::vector<Thread*> threads_;
};

/// Lets others run first, sometimes.
void maybe_pause();

/// A lane's operands of an instruction of the whole warp.
struct Registers {
    uint32_t x[6];
};

/// An instruction that all lanes of a warp execute together: returns, when all have come, the value of each lane. Valid
/// until the lane's next meeting. Lanes that come with different instructions have diverged, which fails.
const uint32_t* meet(const char* instruction, uint32_t value = 0);
const Registers* meet_with_registers(const char* instruction, const Registers& registers);

// ------------------------------------------------------------------------------- asynchronous operations

/// Something that happens at a random time from now on, unless `complete` makes it happen before.
struct Operation {
    const char* name;
    Cta* cta;  // whose shared memory it uses
    std::function<void()> run;
    bool is_done = false;
};
using OperationPtr = std::shared_ptr<Operation>;

OperationPtr start(const char* name, Cta* cta, std::function<void()> run);
void complete(const OperationPtr& operation);

/// Those of one kind that a thread has started and not yet waited for, in groups.
class Groups {
  public:
    void add(OperationPtr operation) { open_.push_back(std::move(operation)); }
    void commit();
    void wait_for_all_but(size_t num_pending);
    bool is_empty() const;

  private:
    std::deque<std::vector<OperationPtr>> committed_;
    std::vector<OperationPtr> open_;
};

// ---------------------------------------------------------------------------------------- shared memory

/// Bytes in a CTA's shared memory. Addresses are 32 bits: the CTA's rank in its cluster, and an offset.
struct Place {
    Cta* cta;
    uint32_t offset;
    uint8_t* bytes;
};

inline constexpr uint32_t kRankShift = 24;
inline constexpr uint32_t kSharedBase = 1024;       // the first offset: the hardware, too, keeps 1 KiB for itself
inline constexpr uint32_t kStaticBytes = 8 * 1024;  // for static variables, before the dynamic memory
inline constexpr uint32_t kMaxSharedBytes = 227 * 1024;

uint32_t address_of(const void* pointer);
Place place_of(uint32_t address, uint32_t num_bytes, const char* instruction);

/// NaN in every float format here.
inline constexpr uint8_t kPoison = 0xFF;

// ---------------------------------------------------------------------------------- what there is of state

/// The state of an mbarrier is kept here; in shared memory there is only a mark, so that overwriting it shows.
struct Mbarrier {
    uint32_t num_arrivals, pending;
    int64_t pending_bytes = 0;
    uint32_t num_phases = 0;  // completed
    const Thread* initialiser;
    bool is_fenced = false;  // visible to the asynchronous proxy and to the cluster
    WaitList waiting;
};

struct NamedBarrier {
    uint32_t num_threads = 0, arrived = 0, num_phases = 0;
    WaitList waiting;
};

struct Warp {
    uint32_t num_ready = 32;            // lanes that run or could
    std::vector<Thread*> to_look;       // lanes in wait_with_warp
    const char* instruction = nullptr;  // that the lanes meet at
    uint32_t arrived = 0, num_meetings = 0;
    uint32_t values[2][32];      // of even and of odd meetings: a lane may leave one after another has come to the next
    Registers registers[2][32];  // likewise
    WaitList waiting;
    bool is_slow;  // seldom gets to run
};

/// Accumulators that WGMMAs in flight own: the thread sees poison there.
struct Accumulators {
    std::vector<float> values;
    int num_in_flight = 0;
};

struct Thread {
    uint3 index;
    uint32_t number;  // in the CTA
    Cta* cta;
    Warp* warp;
    ucontext_t context;
    void* stack;
    Reason reason{"nothing"};
    std::function<bool()> is_over;  // in wait_with_warp
    WaitList* else_waits_in;
    bool is_done = false;

    std::vector<OperationPtr> copies;  // cp.async, not yet tied to a barrier or a group
    Groups copy_groups, stores, wgmmas;
    OperationPtr last_wgmma;  // WGMMAs happen in order
    std::map<float*, Accumulators> accumulators;
    bool has_wgmma_fence = false, lends_registers_to_wgmma = false;
    int num_registers;                    // as setmaxnreg has it
    bool has_arrived_at_cluster = false;  // and has not waited there yet
    uint32_t cluster_phase = 0;           // that it has arrived for

    uint32_t lane() const { return number % 32; }
};

struct Cta {
    uint3 index;
    uint32_t rank;
    Cluster* cluster;
    uint8_t *mapping, *shared;  // the mapping is what the memory is in, between pages that nobody may touch
    size_t mapping_bytes;
    uint32_t dynamic_bytes, shared_bytes;
    std::map<const void*, uint32_t> static_variables;
    uint32_t static_bytes = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    uint32_t num_running;
    std::map<uint32_t, Mbarrier> mbarriers;  // by offset
    NamedBarrier named_barriers[16];
    int spare_registers = 0;  // that threads have given back
    WaitList registers_given_back;
};

struct Cluster {
    std::vector<std::unique_ptr<Cta>> ctas;
    uint32_t num_running;  // threads
    uint32_t arrived = 0, num_phases = 0;
    WaitList waiting;
};

/// To be called when threads arrive at the cluster's barrier, and when they end: the phase completes when every thread
/// that still runs has arrived.
void complete_cluster_phase_if_due(Cluster& cluster);

// ------------------------------------------------------------------------------------------------- launches

struct Launch {
    dim3 grid, block;
    uint32_t dynamic_bytes, cluster_size;
};

/// Runs `kernel` once in each thread; false where it failed, with the sentence in `failure()`.
bool run_grid(const Launch& launch, const std::function<void()>& kernel);
const char* failure();

/// How many CTAs are resident at once, which is also what the emulated device says of its SMs.
int num_sms();

}  // namespace emulator

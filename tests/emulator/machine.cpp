#include "machine.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024, kPageBytes = 4096;
constexpr size_t kGuardBytes = 64 * 1024;  // before and after memory, where nobody may touch anything

struct Failure {};

int sms = 4;
uint64_t seed = 0;

std::mt19937_64 generator;
ucontext_t scheduler;  // where a fiber goes when it waits
char message[2048];
bool has_failed = false;
std::vector<Thread*> ready;
std::vector<OperationPtr> prompt, late;  // operations that were started, among them some that waiting has completed
std::vector<std::unique_ptr<Cluster>> clusters;  // resident
uint32_t prompt_rate, late_rate;  // one step in so many completes a prompt operation; one in so many of these is late
const std::function<void()>* kernel_of_grid;

void return_to_scheduler() { swapcontext(&current->context, &scheduler); }

void make_ready(Thread* thread) {
    ++thread->warp->num_ready;
    ready.push_back(thread);
}

// ------------------------------------------------------------------------------------------------- memory

uint8_t* map_pages(size_t bytes) {
    void* pages = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) fail("the emulator has no memory left");
    return static_cast<uint8_t*>(pages);
}

std::vector<void*> free_stacks;

void* take_stack() {
    if (free_stacks.empty()) {
        uint8_t* pages = map_pages(kGuardBytes + kStackBytes);
        mprotect(pages + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE);
        return pages + kGuardBytes;
    }
    void* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
}

/// The memory ends where nobody may touch anything, or less than 1 KiB before.
void map_shared_memory(Cta& cta) {
    cta.shared_bytes = kStaticBytes + (cta.dynamic_bytes + 1023) / 1024 * 1024;
    const size_t pages = (cta.shared_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    cta.mapping_bytes = pages + 2 * kGuardBytes;
    cta.mapping = map_pages(cta.mapping_bytes);
    mprotect(cta.mapping + kGuardBytes, pages, PROT_READ | PROT_WRITE);
    cta.shared = cta.mapping + kGuardBytes + pages - cta.shared_bytes;
    memset(cta.mapping + kGuardBytes, kPoison, pages);
}

void unmap_shared_memory(Cta& cta) {
    munmap(cta.mapping, cta.mapping_bytes);
    cta.shared = nullptr;
}

// ------------------------------------------------------------------------------------------------- threads

void end_thread() {
    Thread& thread = *current;
    if (!thread.copies.empty() || !thread.copy_groups.is_empty())
        fail("a thread ends with copies by cp.async that nobody waits for");
    if (!thread.stores.is_empty()) fail("a thread ends before its TMA stores have read shared memory");
    if (!thread.wgmmas.is_empty()) fail("a thread ends with WGMMAs in flight");
    thread.is_done = true;
    --thread.cta->num_running;
    Cluster& cluster = *thread.cta->cluster;
    --cluster.num_running;
    if (thread.has_arrived_at_cluster && thread.cluster_phase == cluster.num_phases) --cluster.arrived;
    complete_cluster_phase_if_due(cluster);
    WaitList::look_if_last(*thread.warp);
}

void enter_fiber() {
    (*kernel_of_grid)();
    end_thread();
    return_to_scheduler();
}

void prepare_fiber(Thread& thread) {
    thread.stack = take_stack();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter_fiber, 0);
}

constexpr uint32_t kRegistersOfSm = 64 * 1024;

/// A CTA begins to run some time later, those of a cluster by no means together.
void start_cta(Cluster& cluster, const Launch& launch, uint32_t rank, uint64_t number) {
    cluster.ctas.push_back(std::make_unique<Cta>());
    Cta& cta = *cluster.ctas.back();
    cta.index = {static_cast<uint32_t>(number % launch.grid.x),
                 static_cast<uint32_t>(number / launch.grid.x % launch.grid.y),
                 static_cast<uint32_t>(number / launch.grid.x / launch.grid.y)};
    cta.rank = rank;
    cta.cluster = &cluster;
    cta.dynamic_bytes = launch.dynamic_bytes;
    map_shared_memory(cta);
    cta.num_running = launch.block.x * launch.block.y * launch.block.z;
    cta.threads.resize(cta.num_running);
    cta.warps.resize((cta.num_running + 31) / 32);  // the last may lack lanes: then none of its lanes can meet
    for (Warp& warp : cta.warps) warp.is_slow = draw(4) == 0;
    for (uint32_t i = 0; i < cta.num_running; ++i) {
        Thread& thread = cta.threads[i];
        thread.number = i;
        thread.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
        thread.cta = &cta;
        thread.num_registers = static_cast<int>(kRegistersOfSm / cta.num_running / 8 * 8);  // as if the CTA is alone
        thread.warp = &cta.warps[i / 32];
        prepare_fiber(thread);
    }
    start("its start", &cta, [&cta] {
        for (Thread& thread : cta.threads) ready.push_back(&thread);
    });
}

void start_cluster(const Launch& launch, uint64_t number) {
    clusters.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters.back();
    for (uint32_t rank = 0; rank < launch.cluster_size; ++rank)
        start_cta(cluster, launch, rank, number * launch.cluster_size + rank);
    cluster.num_running = launch.block.x * launch.block.y * launch.block.z * launch.cluster_size;
}

void free_cta(Cta& cta) {
    for (Thread& thread : cta.threads) free_stacks.push_back(thread.stack);
    cta.threads.clear();
    unmap_shared_memory(cta);
}

void retire_cta(Cta& cta) {
    for (auto* operations : {&prompt, &late}) {
        const auto is_done = [](const OperationPtr& operation) { return operation->is_done; };
        operations->erase(std::remove_if(operations->begin(), operations->end(), is_done), operations->end());
        for (const OperationPtr& operation : *operations) {
            if (operation->cta == &cta)
                fail("CTA %u ends while its shared memory is used by %s", cta.index.x, operation->name);
        }
    }
    const uint8_t* end = cta.shared + cta.shared_bytes;
    for (const uint8_t* byte = cta.shared + kStaticBytes + cta.dynamic_bytes; byte != end; ++byte) {
        if (*byte != kPoison) fail("CTA %u has written beyond its shared memory", cta.index.x);
    }
    free_cta(cta);
    Cluster* cluster = cta.cluster;
    if (cluster->num_running != 0) return;
    const auto is_it = [cluster](const auto& other) { return other.get() == cluster; };
    clusters.erase(std::find_if(clusters.begin(), clusters.end(), is_it));
}

// ----------------------------------------------------------------------------------------------- deadlocks

/// Who waits for what, warp by warp.
std::string describe_waiting() {
    std::string report;
    const auto add = [&report](const Thread& first, uint32_t num_lanes) {
        char line[256], reason[160];
        snprintf(reason, sizeof(reason), first.reason.format, first.reason.first, first.reason.second);
        snprintf(line, sizeof(line), "\n  CTA %u, warp %u, %u lanes from %u: %s", first.cta->index.x, first.number / 32,
                 num_lanes, first.lane(), reason);
        report += line;
    };
    const auto same = [](const Thread& x, const Thread& y) {
        return x.warp == y.warp && x.is_done == y.is_done && x.reason.format == y.reason.format &&
               x.reason.first == y.reason.first && x.reason.second == y.reason.second;
    };
    for (const auto& cluster : clusters) {
        for (const auto& cta : cluster->ctas) {
            for (size_t i = 0, next; i < cta->threads.size(); i = next) {
                const Thread& first = cta->threads[i];
                for (next = i + 1; next < cta->threads.size() && same(first, cta->threads[next]);) ++next;
                if (!first.is_done) add(first, static_cast<uint32_t>(next - i));
            }
        }
    }
    return report;
}

// ------------------------------------------------------------------------------------------------- running

bool complete_one_of(std::vector<OperationPtr>& operations) {
    while (!operations.empty()) {
        std::swap(operations[draw(static_cast<uint32_t>(operations.size()))], operations.back());
        const OperationPtr operation = std::move(operations.back());
        operations.pop_back();
        if (operation->is_done) continue;
        complete(operation);
        return true;
    }
    return false;
}

/// Any ready thread; one of a slow warp only if it is drawn again and again.
Thread* take_ready_thread() {
    size_t chosen = 0;
    for (int attempt = 0; attempt < 4; ++attempt) {
        chosen = draw(static_cast<uint32_t>(ready.size()));
        if (!ready[chosen]->warp->is_slow) break;
    }
    std::swap(ready[chosen], ready.back());
    Thread* thread = ready.back();
    ready.pop_back();
    return thread;
}

/// Late operations complete when nothing else can go on: or else none would outlast what takes many steps.
void step() {
    if ((ready.empty() || draw(prompt_rate) == 0) && complete_one_of(prompt)) return;
    if (ready.empty() && complete_one_of(late)) return;
    if (ready.empty()) fail("deadlock: no thread can go on%s", describe_waiting().c_str());
    current = take_ready_thread();
    threadIdx = current->index;
    blockIdx = current->cta->index;
    swapcontext(&scheduler, &current->context);
    Thread* const thread = current;
    current = nullptr;
    if (has_failed) throw Failure{};
    if (thread->is_done && thread->cta->num_running == 0) retire_cta(*thread->cta);
}

/// A fiber that touches memory which is not there must not take the process with it.
void on_bad_access(int, siginfo_t* info, void*) {
    if (current == nullptr) {
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    for (const auto& cta : current->cta->cluster->ctas) {
        const auto* address = static_cast<const uint8_t*>(info->si_addr);
        if (cta->shared && address >= cta->mapping && address < cta->mapping + cta->mapping_bytes)
            fail("access to shared memory at offset %td, of %u bytes", address - cta->shared - kStaticBytes,
                 cta->dynamic_bytes);
    }
    fail("access to address %p, where there is no memory", info->si_addr);
}

class BadAccessHandler {
  public:
    BadAccessHandler() {
        stack_t alternate{};
        alternate.ss_sp = stack_;
        alternate.ss_size = sizeof(stack_);
        sigaltstack(&alternate, &old_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_bad_access;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_action_);
    }
    ~BadAccessHandler() {
        sigaction(SIGSEGV, &old_action_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

  private:
    char stack_[64 * 1024];
    stack_t old_stack_;
    struct sigaction old_action_;
};

void check_launch(const Launch& launch) {
    const uint32_t num_threads = launch.block.x * launch.block.y * launch.block.z;
    if (num_threads == 0 || num_threads > 1024) fail("a CTA of %u threads: wanted 1 to 1024", num_threads);
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || launch.grid.y > 65535 ||
        launch.grid.z > 65535)
        fail("a grid of %u x %u x %u CTAs", launch.grid.x, launch.grid.y, launch.grid.z);
    if (launch.dynamic_bytes > kMaxSharedBytes) fail("%u bytes of shared memory for a CTA", launch.dynamic_bytes);
    if (launch.cluster_size == 0 || launch.cluster_size > 8 || launch.grid.x % launch.cluster_size != 0)
        fail("clusters of %u CTAs in a grid of %u", launch.cluster_size, launch.grid.x);
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int length = vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    if (current == nullptr) throw Failure{};
    if (length >= 0 && static_cast<size_t>(length) < sizeof(message))
        snprintf(message + length, sizeof(message) - length, " (CTA %u, thread %u)", current->cta->index.x,
                 current->number);
    has_failed = true;
    setcontext(&scheduler);
    __builtin_unreachable();
}

const char* failure() { return message; }
int num_sms() { return sms; }
uint32_t draw(uint32_t limit) { return static_cast<uint32_t>(generator() % limit); }

void WaitList::wait(const Reason& reason) {
    current->reason = reason;
    threads_.push_back(current);
    WaitList::look_if_last(*current->warp);
    return_to_scheduler();
}

void WaitList::wait_with_warp(const Reason& reason, std::function<bool()> is_over) {
    current->reason = reason;
    current->is_over = std::move(is_over);
    current->else_waits_in = this;
    current->warp->to_look.push_back(current);
    WaitList::look_if_last(*current->warp);
    return_to_scheduler();
}

void WaitList::look_if_last(Warp& warp) {
    if (--warp.num_ready != 0) return;
    for (Thread* thread : std::exchange(warp.to_look, {})) {
        if (thread->is_over()) {
            make_ready(thread);
        } else {
            thread->else_waits_in->threads_.push_back(thread);
        }
    }
}

void WaitList::wake() {
    for (Thread* thread : std::exchange(threads_, {})) make_ready(thread);
}

void maybe_pause() {
    if (draw(4) != 0) return;
    ready.push_back(current);
    return_to_scheduler();
}

const uint32_t* meet(const char* instruction, uint32_t value) {
    Warp& warp = *current->warp;
    const uint32_t meeting = warp.num_meetings;
    if (warp.arrived == 0) warp.instruction = instruction;
    if (strcmp(warp.instruction, instruction) != 0)
        fail("warp %u has diverged: lane %u is at %s, others at %s", current->number / 32, current->lane(), instruction,
             warp.instruction);
    warp.values[meeting % 2][current->lane()] = value;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.num_meetings;
        warp.waiting.wake();
    }
    while (warp.num_meetings == meeting) warp.waiting.wait({"the other lanes of its warp"});
    return warp.values[meeting % 2];
}

const Registers* meet_with_registers(const char* instruction, const Registers& registers) {
    Registers(&lanes)[32] = current->warp->registers[current->warp->num_meetings % 2];
    lanes[current->lane()] = registers;
    meet(instruction);
    return lanes;
}

OperationPtr start(const char* name, Cta* cta, std::function<void()> run) {
    auto& operations = draw(late_rate) == 0 ? late : prompt;
    operations.push_back(std::make_shared<Operation>(Operation{name, cta, std::move(run)}));
    return operations.back();
}

void complete(const OperationPtr& operation) {
    if (operation->is_done) return;
    operation->is_done = true;
    operation->run();
    operation->run = nullptr;
}

void Groups::commit() { committed_.push_back(std::exchange(open_, {})); }

void Groups::wait_for_all_but(size_t num_pending) {
    for (; committed_.size() > num_pending; committed_.pop_front()) {
        for (const OperationPtr& operation : committed_.front()) complete(operation);
    }
}

bool Groups::is_empty() const {
    return open_.empty() && std::all_of(committed_.begin(), committed_.end(), [](const auto& x) { return x.empty(); });
}

uint32_t address_of(const void* pointer) {
    const Cta& cta = *current->cta;
    const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - cta.shared;
    if (offset < 0 || offset >= cta.shared_bytes) fail("%p is not in this CTA's shared memory", pointer);
    return cta.rank << kRankShift | (kSharedBase + static_cast<uint32_t>(offset));
}

Place place_of(uint32_t address, uint32_t num_bytes, const char* instruction) {
    const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
    const auto& ctas = current->cta->cluster->ctas;
    if (rank >= ctas.size()) fail("%s: an address in CTA %u of a cluster of %zu", instruction, rank, ctas.size());
    Cta* cta = ctas[rank].get();
    if (cta->shared == nullptr) fail("%s: an address in CTA %u of the cluster, which has ended", instruction, rank);
    if (offset < kSharedBase || uint64_t{offset} + num_bytes > kSharedBase + kStaticBytes + cta->dynamic_bytes)
        fail("%s: %u bytes at 0x%x are outside shared memory", instruction, num_bytes, address);
    return {cta, offset, cta->shared + (offset - kSharedBase)};
}

void complete_cluster_phase_if_due(Cluster& cluster) {
    if (cluster.arrived < cluster.num_running || cluster.arrived == 0) return;
    cluster.arrived = 0;
    ++cluster.num_phases;
    cluster.waiting.wake();
}

bool run_grid(const Launch& launch, const std::function<void()>& kernel) {
    message[0] = 0;
    has_failed = false;
    kernel_of_grid = &kernel;
    blockDim = launch.block;
    gridDim = launch.grid;
    generator.seed(seed);
    constexpr uint32_t kPromptRates[] = {2, 32, 1024}, kLateRates[] = {2, 8, 64};
    prompt_rate = kPromptRates[draw(3)];
    late_rate = kLateRates[draw(3)];
    BadAccessHandler handler;
    bool is_good = true;
    try {
        check_launch(launch);
        const uint64_t num_clusters = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z / launch.cluster_size;
        const uint64_t num_resident = std::max<uint64_t>(1, static_cast<uint32_t>(sms) / launch.cluster_size);
        for (uint64_t next = 0; next < num_clusters || !clusters.empty();) {
            if (next < num_clusters && clusters.size() < num_resident) {
                start_cluster(launch, next++);
            } else {
                step();
            }
        }
    } catch (const Failure&) {
        is_good = false;
        current = nullptr;
        for (const auto& cluster : clusters) {
            for (const auto& cta : cluster->ctas) {
                if (cta->shared) free_cta(*cta);
            }
        }
    }
    ready.clear();
    prompt.clear();
    late.clear();
    clusters.clear();
    return is_good;
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulator_set(int num_sms, uint64_t seed) {
    emulator::sms = num_sms;
    emulator::seed = seed;
}

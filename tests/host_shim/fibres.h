// The threads of blocks as fibres on one system thread, which change only where a thread waits: for its
// warp, at a barrier, or for what another thread or another block does. A thread runs on until it must
// wait for its warp, a warp until it must wait for the block, a block until it must wait for the others;
// the lowest number first or the highest, as the launch says. So a missing barrier lets a warp read what
// its neighbours have not written yet, and the order is the same in every run.
//
// Blocks run one after another, or, where the launch is cooperative, all at the same time.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct Dim { uint32_t x = 0, y = 1, z = 1; };
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

// `poll`: it has looked for what is not there yet.
enum class State { fresh, ready, exchange, barrier, poll, ended };

// 16 bytes to shared memory, or zeros.
struct Copy { uint8_t* to; const void* from; bool valid; };
// Bytes to shared memory, which complete the barrier at `barrier`.
struct BulkCopy { void* barrier; uint8_t* to; const void* from; uint32_t bytes; };

constexpr size_t STACK = 128 << 10;
constexpr size_t SHARED = 256 << 10;
constexpr uint32_t TOGETHER = 64;  // blocks that run at the same time, at most
constexpr uint32_t BARRIERS = 16;  // of a block, by number
constexpr uint32_t EVERYONE = 0;   // counted by a barrier: all threads that have not ended

struct Fibre {
    ucontext_t start;
    jmp_buf again;             // where it begins in later launches
    bool known = false;        // that place is
    jmp_buf here;
    std::unique_ptr<char[]> stack{new char[STACK]};  // not touched before it is used
    State state = State::fresh;
    uint32_t barrier = 0;      // that it waits at
    uint32_t parity = 0;       // which of its two slots the next exchange uses
    uint32_t slots[2][6];
    std::vector<Copy> open;    // copies of no group yet
    std::deque<std::vector<Copy>> groups;
    const void* looked;        // what it looked at last
    const void* anchor;        // and at some time before
    uint32_t looks;            // since anything changed, or since it let others run
    uint64_t looked_at;        // `events` at the last of them
    const void* waits_for;     // what it looked at in vain
};

struct Barrier { uint32_t arrived = 0, count = 0; };

struct Block {
    uint32_t index = 0, live = 0;
    std::deque<Fibre> fibres;
    std::unique_ptr<uint8_t[]> room{new uint8_t[SHARED + 128]};
    Barrier barriers[BARRIERS];
    std::vector<BulkCopy> copies;  // on their way
    int any = 0;                   // of __syncthreads_or
    uint64_t seen = 0;             // `events` when its threads last looked

    uint8_t* dynamic() {
        const uintptr_t at = reinterpret_cast<uintptr_t>(room.get());
        return room.get() + (128 - at % 128) % 128;
    }
};

inline std::deque<Block> blocks;
inline Block* here;            // the block that runs
inline uint8_t* dynamic;       // its shared memory whose size the launch gives
inline uint32_t dynamic_bytes;
inline uint32_t current;       // the thread that runs
inline jmp_buf scheduler;
inline bool backwards;         // the highest number first
inline std::function<void()> body;
inline uint64_t ticks;
inline uint64_t events;        // what a thread that polls may have waited for
inline int code;               // of this launch
inline std::string why;        // it is not 0
inline uint32_t plant;         // the defect that a test has built in, or 0

constexpr int IN_VAIN = 1, NO_ROOM = 2, MISUSED = 3;

inline Fibre& fibre() { return here->fibres[current]; }

// Which copy of a variable in shared memory is this block's.
inline uint32_t place() { return here->index % TOGETHER; }

inline void away() {
    if (_setjmp(fibre().here) == 0) _longjmp(scheduler, 1);
}

inline void wait(State state) {
    fibre().state = state;
    away();
}

// Lets others run first.
inline void give_way() { wait(State::ready); }

// What no device allows: the launch ends with it.
inline void misuse(const std::string& what) {
    if (code == 0) {
        code = MISUSED;
        why = "block " + std::to_string(here->index) + ", thread " + std::to_string(current) + ": " + what;
    }
    wait(State::poll);
}

// Lets those who wait at a barrier go on, if all have arrived.
inline void settle(uint32_t id) {
    Barrier& b = here->barriers[id];
    if (b.arrived == 0 || b.arrived < (b.count == EVERYONE ? here->live : b.count)) return;
    b.arrived = 0;
    events++;
    for (Fibre& f : here->fibres) {
        if (f.state == State::barrier && f.barrier == id) f.state = State::ready;
    }
}

// Counts this thread, one of `count`, at a barrier.
inline void arrive(uint32_t id, uint32_t count) {
    Barrier& b = here->barriers[id];
    if (b.arrived != 0 && b.count != count) misuse("barrier " + std::to_string(id) + " has two counts");
    b.count = count;
    b.arrived++;
    settle(id);
}

// And waits there for the others.
inline void meet(uint32_t id, uint32_t count) {
    fibre().state = State::barrier;
    fibre().barrier = id;
    arrive(id, count);
    away();
}

[[noreturn]] inline void leave() {
    fibre().state = State::ended;
    here->live--;
    events++;
    for (uint32_t id = 0; id < BARRIERS; id++) {
        if (here->barriers[id].count == EVERYONE) settle(id);
    }
    _longjmp(scheduler, 1);
}

// Before a look at what others change: lets them run where this thread goes round in a circle in which
// nothing has changed.
inline void look(const void* at) {
    Fibre& f = fibre();
    const bool circle = f.looked_at == events && (at == f.looked || at == f.anchor);
    if (circle) {
        f.waits_for = at;
        wait(State::poll);
    }
    if (circle || f.looked_at != events) f.looks = 0, f.looked_at = events;
    f.looked = at;
    // Moved less and less often, so that a circle of any length comes back to it.
    if ((f.looks & (f.looks - 1)) == 0) f.anchor = at;
    f.looks++;
}

inline void enter() {
    fibre().known = true;
    _setjmp(fibre().again);
    body();
    leave();
}

// Lets a fibre run until it waits or ends.
__attribute__((noinline)) inline void resume(Fibre& f) {
    const bool fresh = f.state == State::fresh;
    f.state = State::ready;
    if (_setjmp(scheduler) != 0) return;
    if (fresh) setcontext(&f.start);
    _longjmp(f.here, 1);
}

// Lets the threads of a warp that exchange go on if all that have not ended do.
inline bool exchanged(uint32_t from, uint32_t to) {
    bool any = false;
    for (uint32_t i = from; i < to; i++) {
        const State state = here->fibres[i].state;
        if (state != State::exchange && state != State::ended) return false;
        any |= state == State::exchange;
    }
    for (uint32_t i = from; i < to; i++) {
        if (here->fibres[i].state == State::exchange) here->fibres[i].state = State::ready;
    }
    return any;
}

// Lets the threads of a warp run until each has ended or waits for others than its warp.
inline void run_warp(uint32_t warp, uint32_t threads) {
    const uint32_t from = 32 * warp, to = from + 32 < threads ? from + 32 : threads;
    do {
        for (uint32_t n = from; n < to; n++) {
            const uint32_t i = backwards ? from + to - 1 - n : n;
            const State state = here->fibres[i].state;
            if (state != State::ready && state != State::fresh) continue;
            threadIdx.x = current = i;
            resume(here->fibres[i]);
        }
    } while (exchanged(from, to));
}

// Lets a block run until each of its threads has ended or waits for other blocks.
inline void run_block(Block& block, uint32_t threads) {
    here = &block;
    dynamic = block.dynamic();
    blockIdx.x = block.index;
    const uint32_t warps = (threads + 31) / 32;
    while (block.live > 0 && block.seen != events && code == 0) {
        block.seen = events;
        for (uint32_t i = 0; i < threads; i++) {
            if (block.fibres[i].state == State::poll) block.fibres[i].state = State::ready;
        }
        for (uint32_t n = 0; n < warps; n++) run_warp(backwards ? warps - 1 - n : n, threads);
    }
}

inline void prepare(Block& block, uint32_t index, uint32_t threads) {
    block.index = index;
    block.live = threads;
    while (block.fibres.size() < threads) block.fibres.emplace_back();
    for (Barrier& b : block.barriers) b = {};
    block.copies.clear();
    block.seen = events++;
    memset(block.dynamic(), 0xFF, dynamic_bytes);  // not a number
    // More of them are an earlier launch's, and have ended.
    for (Fibre& f : block.fibres) f.state = State::ended;
    for (uint32_t i = 0; i < threads; i++) {
        Fibre& f = block.fibres[i];
        f.parity = 0;
        f.open.clear();
        f.groups.clear();
        f.looked = f.anchor = f.waits_for = nullptr;
        f.looks = 0, f.looked_at = events;
        f.state = f.known ? State::ready : State::fresh;
        if (f.known) {
            memcpy(f.here, f.again, sizeof f.here);
            continue;
        }
        getcontext(&f.start);
        f.start.uc_stack = {f.stack.get(), 0, STACK};
        f.start.uc_link = nullptr;
        makecontext(&f.start, enter, 0);
    }
}

// Of every block that has not ended: what its warps wait for.
inline std::string waiting(uint32_t count) {
    std::string all;
    for (uint32_t n = 0; n < count; n++) {
        const Block& block = blocks[n];
        if (block.live == 0) continue;
        all += "\nblock " + std::to_string(block.index) + ":";
        uint32_t first = 0;
        auto what = [&](uint32_t i) -> std::string {
            const Fibre& f = block.fibres[i];
            if (f.state == State::ended) return "ended";
            if (f.state == State::exchange) return "for its warp";
            if (f.state == State::barrier) {
                const Barrier& b = block.barriers[f.barrier];
                return "barrier " + std::to_string(f.barrier) + ", " + std::to_string(b.arrived) + " of " + std::to_string(b.count);
            }
            const auto at = static_cast<const uint8_t*>(f.waits_for);
            const uint8_t* const mine = const_cast<Block&>(block).dynamic();
            char text[64];
            if (at >= mine && at < mine + SHARED) snprintf(text, sizeof text, "shared %td", at - mine);
            else snprintf(text, sizeof text, "global %p", f.waits_for);
            return text;
        };
        for (uint32_t i = 1; i <= block.fibres.size(); i++) {
            if (i < block.fibres.size() && what(i) == what(first)) continue;
            all += " [" + std::to_string(first) + ".." + std::to_string(i - 1) + " " + what(first) + "]";
            first = i;
        }
    }
    return all;
}

// Runs `count` blocks at the same time, the first being number `first`.
inline int run_blocks(uint32_t first, uint32_t count, uint32_t threads) {
    while (blocks.size() < count) blocks.emplace_back();
    for (uint32_t n = 0; n < count; n++) prepare(blocks[n], first + n, threads);
    for (;;) {
        const uint64_t before = events;
        bool ended = true;
        for (uint32_t n = 0; n < count && code == 0; n++) {
            Block& block = blocks[backwards ? count - 1 - n : n];
            run_block(block, threads);
            ended &= block.live == 0;
        }
        if (code != 0 || ended) return code;
        if (events != before) continue;
        why = "threads wait in vain:" + waiting(count);
        return code = IN_VAIN;
    }
}

inline int launch(uint32_t grid, uint32_t threads, uint32_t shared, bool together, std::function<void()> kernel) {
    code = 0;
    why.clear();
    dynamic_bytes = shared;
    if (shared > SHARED || (together && grid > TOGETHER)) return NO_ROOM;
    body = std::move(kernel);
    gridDim.x = grid;
    blockDim.x = threads;
    if (together) return run_blocks(0, grid, threads);
    for (uint32_t b = 0; b < grid; b++) {
        if (run_blocks(b, 1, threads) != 0) return code;
    }
    return 0;
}

}  // namespace shim

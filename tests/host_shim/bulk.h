// What the persistent kernel does besides: barriers in shared memory, bulk copies that complete them,
// barriers by number, words that blocks send each other.
//
// A bulk copy is done when its barrier is first waited for, as late as it may be; until then its place
// holds no numbers. So whoever reads too early, or released a place too early, reads those.
#pragma once
#include "shim.h"

namespace shim {

// A barrier in shared memory, in its own 8 bytes: of this phase, the arrivals that are missing and twice the
// bytes that are, plus the phase's parity.
struct MemoryBarrier {
    uint16_t count, missing;
    int32_t bytes_and_parity;

    uint32_t parity() const { return bytes_and_parity & 1; }
    // Whether this ended a phase.
    bool settle() {
        if (missing != 0 || bytes_and_parity >> 1 != 0) return false;
        missing = count;
        bytes_and_parity ^= 1;
        events++;
        return true;
    }
};
static_assert(sizeof(MemoryBarrier) == 8);

inline MemoryBarrier& barrier_at(uint32_t address) {
    if (address % 8 != 0 || address + 8 > dynamic_bytes) misuse("no barrier can be at " + std::to_string(address));
    return *reinterpret_cast<MemoryBarrier*>(at_shared(address));
}
inline void barrier_init(uint32_t at, uint32_t count = 1) {
    barrier_at(at) = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
}
inline void barrier_arrive(uint32_t at, uint32_t count) {
    MemoryBarrier& b = barrier_at(at);
    if (count > b.missing) misuse(std::to_string(count) + " arrivals at " + std::to_string(at) + ", which misses " + std::to_string(b.missing));
    b.missing = static_cast<uint16_t>(b.missing - count);
    // Who waited for it may be faster than this thread.
    if (b.settle()) give_way();
}
inline void barrier_expect(uint32_t at, uint32_t bytes) {
    barrier_at(at).bytes_and_parity += static_cast<int32_t>(2 * bytes);
    barrier_arrive(at, 1);
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t) {
    if ((to | bytes | static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from))) % 16 != 0 || bytes == 0) misuse("a copy of other than 16 bytes each");
    if (to + bytes > dynamic_bytes) misuse("a copy to beyond shared memory");
    memset(at_shared(to), 0xFF, bytes);
    here->copies.push_back({&barrier_at(barrier), at_shared(to), from, bytes});
    events++;
}
// Does the copies that complete `barrier`.
inline void land(MemoryBarrier& barrier) {
    auto& copies = here->copies;
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].barrier != &barrier) {
            i++;
            continue;
        }
        memcpy(copies[i].to, copies[i].from, copies[i].bytes);
        barrier.bytes_and_parity -= static_cast<int32_t>(2 * copies[i].bytes);
        copies.erase(copies.begin() + static_cast<ptrdiff_t>(i));
    }
    barrier.settle();
}
inline void barrier_try_wait(uint32_t& done, uint32_t at, uint32_t parity) {
    MemoryBarrier& b = barrier_at(at);
    // What is on its way needs nobody else.
    if (b.parity() == parity) land(b);
    if (b.parity() == parity) {
        look(&b);
        if (b.parity() == parity) land(b);
    }
    done = b.parity() != parity;
}

template <uint32_t ID>
void meet_at(uint32_t count) { meet(ID, count); }
template <uint32_t ID>
void arrive_at(uint32_t count) { arrive(ID, count); }

template <class T>
void post(void* at, T v) {
    memcpy(at, &v, sizeof v);
    events++;
}
template <class T>
void peek(T& v, const void* at) {
    look(at);
    memcpy(&v, at, sizeof v);
}
inline void peek_pair(uint32_t& x, uint32_t& y, const void* at) {
    look(at);
    memcpy(&x, at, 4), memcpy(&y, static_cast<const uint8_t*>(at) + 4, 4);
}
inline void peek_four(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, const void* at) {
    look(at);
    load_words(x, y, z, w, at);
}

// A word that others change, which a loop reads until it is as it should be.
struct Watched {
    const uint32_t* at;
    Watched(const uint32_t& word) : at(&word) {}
    operator uint32_t() const {
        look(at);
        return *at;
    }
};

}  // namespace shim

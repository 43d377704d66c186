#define _GNU_SOURCE
#include "exchange.h"
#include "relax.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPINS 2000       // looks at a counter before we lay ourselves to sleep: tens of µs
#define NAP_NS 20000000  // the longest sleep: then we look whether anybody has given up

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// The counters lie in memory shared by processes, so the futexes are not private ones.
static void wake(struct counter *counter) {
    if (__atomic_load_n(&counter->sleepers, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &counter->count, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int reached(const struct counter *counter, uint32_t target) { return (int32_t)(counted(counter) - target) >= 0; }

static int64_t wait_for(struct endpoint *end, struct counter *counter, uint32_t target) {
    for (int i = 0; i < SPINS; i++) {
        if (reached(counter, target)) return FAILED_NOT;
        relax();
    }
    int64_t failed = FAILED_NOT, deadline = now_ns() + end->timeout_ns;
    __atomic_fetch_add(&counter->sleepers, 1, __ATOMIC_SEQ_CST);
    while (!failed) {
        uint32_t seen = __atomic_load_n(&counter->count, __ATOMIC_SEQ_CST);
        if ((int32_t)(seen - target) >= 0) break;
        if (__atomic_load_n(end->aborted, __ATOMIC_ACQUIRE)) failed = FAILED_ABORTED;
        else if (now_ns() > deadline) failed = FAILED_LATE;
        else syscall(SYS_futex, &counter->count, FUTEX_WAIT, seen, &(struct timespec){.tv_nsec = NAP_NS}, NULL, 0);
    }
    __atomic_fetch_sub(&counter->sleepers, 1, __ATOMIC_SEQ_CST);
    return failed;
}

void meet(const struct meet_op *op) {
    if (op->own) {
        __atomic_fetch_add(&op->own->count, 1, __ATOMIC_SEQ_CST);
        wake(op->own);
    }
    uint32_t target = counted(op->clock) + (uint32_t)op->ahead;
    int64_t first = 0;
    while (first < op->num_others && reached(op->others[first], target)) first++;
    int64_t start = first < op->num_others ? now_ns() : 0;
    for (int64_t i = first; i < op->num_others && !op->end->failed; i++)
        __atomic_store_n(&op->end->failed, wait_for(op->end, op->others[i], target), __ATOMIC_RELEASE);
    struct tally *tally = op->end->tally;
    int64_t waited = start ? now_ns() - start : 0;
    __atomic_fetch_add(op->idle ? &tally->idle_ns : &tally->waited_ns, waited, __ATOMIC_RELAXED);
    if (op->own) __atomic_fetch_add(&tally->exchanges, 1, __ATOMIC_RELAXED);
    // where nothing had to be waited for, an abort is found out too
    if (!op->end->failed && __atomic_load_n(op->end->aborted, __ATOMIC_ACQUIRE)) op->end->failed = FAILED_ABORTED;
}

void take_time(int64_t ns) {
    struct timespec left = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    while (nanosleep(&left, &left)) {}
}

void give_up(uint32_t *aborted, struct counter *counters, int64_t count) {
    __atomic_store_n(aborted, 1, __ATOMIC_SEQ_CST);
    for (int64_t i = 0; i < count; i++) syscall(SYS_futex, &counters[i].count, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

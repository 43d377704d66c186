// Threads that share out the units of one operation after the other.
//
// An operation is a stage. Its units are dealt to the threads in contiguous ranges; who is done with his own takes
// from the end of another's, so that a thread the system has put aside (two cores, and a gateway that wants one)
// holds up nobody but for the unit it is at. Who ends the last unit opens the next stage. No thread waits for
// another to *arrive*: a thread that comes late finds the stage closed and goes on to the current one.
//
// A range is one word: [tag of the stage: 24][begin: 20][end: 20]. It is only ever taken from by compare-and-swap,
// so a thread that slept through a stage cannot take a unit of it any more; and while a thread holds a unit, the stage
// cannot end, so what it reads then (operations, batch) is the stage's own.
#define _GNU_SOURCE
#include "team.h"
#include "relax.h"

#include <fenv.h>
#include <linux/futex.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define IDLE (1ull << 63)  // in `stage`: no run is on
#define MAX_UNITS ((1 << 20) - 1)
#define STACK_BYTES (8 << 20)  // whatever `ulimit -s` says: tiles and their sums lie on the stack
#define SPINS 1000  // looks at `stage` before a thread lays itself to sleep: some 20 µs

struct member {
    _Alignas(64) _Atomic uint64_t range;
    struct team *team;
    pthread_t thread;
    int64_t index;
};

struct team {
    _Alignas(64) _Atomic uint64_t stage;  // counts up over all runs; IDLE is added between them
    _Atomic uint32_t signal, sleepers;    // `signal` is the futex of those waiting for another stage
    _Alignas(64) _Atomic int64_t remaining;  // claims of this stage not done yet
    // Of the run that is on; written before its first stage opens.
    const struct isa *isa;
    const struct op *ops;
    const struct batch *batch;
    uint64_t first_stage, last_stage;
    // Of the stage that is open.
    int64_t units, units_per_claim;

    int64_t size;
    int64_t callers_cpu;  // which the next caller is to be pinned to; -1: none
    atomic_bool stopping;
    pid_t process;  // a child made by fork has the memory of the team, but none of its threads
    pthread_mutex_t running;
    struct member members[];
};

static void wake(struct team *team) {
    if (atomic_load(&team->sleepers)) {
        atomic_fetch_add(&team->signal, 1);
        syscall(SYS_futex, &team->signal, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
}

static void wait_for_change(struct team *team, uint64_t stage) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&team->stage, memory_order_acquire) != stage) return;
        relax();
    }
    // `sleepers` before the second look at `stage`: whoever opens a stage after that look sees the sleeper
    atomic_fetch_add(&team->sleepers, 1);
    uint32_t signal = atomic_load(&team->signal);
    if (atomic_load(&team->stage) == stage && !atomic_load(&team->stopping))
        syscall(SYS_futex, &team->signal, FUTEX_WAIT_PRIVATE, signal, NULL, NULL, 0);
    atomic_fetch_sub(&team->sleepers, 1);
}

// Open the first stage from `stage` on that has units, or end the run.
static void open_stage(struct team *team, uint64_t stage) {
    int64_t units = 0;
    if (team->batch->failed && *team->batch->failed) stage = team->last_stage + 1;
    for (; stage <= team->last_stage; stage++) {
        const struct op *op = &team->ops[stage - team->first_stage];
        units = team->isa->units[op->kind](op, team->batch);
        if (units > 0) break;
    }
    if (stage > team->last_stage) {
        atomic_store(&team->stage, stage | IDLE);
        wake(team);
        return;
    }
    int64_t per_claim = (units + MAX_UNITS - 1) / MAX_UNITS, claims = (units + per_claim - 1) / per_claim;
    team->units = units;
    team->units_per_claim = per_claim;
    atomic_store_explicit(&team->remaining, claims, memory_order_relaxed);
    for (int64_t i = 0; i < team->size; i++) {
        uint64_t begin = claims * i / team->size, end = claims * (i + 1) / team->size;
        atomic_store_explicit(&team->members[i].range, stage << 40 | begin << 20 | end, memory_order_release);
    }
    atomic_store(&team->stage, stage);
    wake(team);
}

// One claim of `stage`: from the front of our own range, else from the back of another's. -1: none is left.
static int64_t claim(struct team *team, int64_t self, uint64_t stage) {
    for (int64_t i = 0; i < team->size; i++) {
        _Atomic uint64_t *range = &team->members[(self + i) % team->size].range;
        uint64_t seen = atomic_load_explicit(range, memory_order_acquire);
        for (;;) {
            uint64_t begin = seen >> 20 & MAX_UNITS, end = seen & MAX_UNITS;
            if (seen >> 40 != (stage & 0xFFFFFF) || begin >= end) break;
            uint64_t taken = i == 0 ? seen + (1 << 20) : seen - 1;
            if (atomic_compare_exchange_weak_explicit(range, &seen, taken, memory_order_acquire, memory_order_acquire))
                return (int64_t)(i == 0 ? begin : end - 1);
        }
    }
    return -1;
}

static void work(struct team *team, int64_t self, uint64_t stage) {
    for (int64_t mine; (mine = claim(team, self, stage)) >= 0;) {
        const struct op *op = &team->ops[stage - team->first_stage];
        int64_t first = mine * team->units_per_claim, last = first + team->units_per_claim;
        team->isa->run[op->kind](op, team->batch, first, last < team->units ? last : team->units);
        if (self == 0 && team->batch->moves) __atomic_fetch_add(team->batch->moves, 1, __ATOMIC_RELAXED);
        if (atomic_fetch_sub_explicit(&team->remaining, 1, memory_order_acq_rel) == 1) open_stage(team, stage + 1);
    }
}

static void *member_main(void *argument) {
    struct member *member = argument;
    struct team *team = member->team;
    fesetenv(FE_DFL_ENV);
    while (!atomic_load(&team->stopping)) {
        uint64_t stage = atomic_load_explicit(&team->stage, memory_order_acquire);
        if (!(stage & IDLE)) work(team, member->index, stage);
        wait_for_change(team, stage);
    }
    return NULL;
}

static void pin(pthread_t thread, int64_t cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread, sizeof set, &set);  // a core that is gone: run where the system likes
}

void team_run(struct team *team, const struct isa *isa, const struct op *ops, int64_t count, const struct batch *batch) {
    pthread_mutex_lock(&team->running);
    // the caller may have set denormals to zero, or another rounding: not for his share alone
    fenv_t callers_environment;
    fegetenv(&callers_environment);
    fesetenv(FE_DFL_ENV);
    if (team->callers_cpu >= 0) {
        pin(pthread_self(), team->callers_cpu);
        team->callers_cpu = -1;
    }
    uint64_t stage = (atomic_load(&team->stage) & ~IDLE) + 1;
    team->isa = isa;
    team->ops = ops;
    team->batch = batch;
    team->first_stage = stage;
    team->last_stage = stage + (uint64_t)count - 1;
    open_stage(team, stage);
    while (!((stage = atomic_load_explicit(&team->stage, memory_order_acquire)) & IDLE)) {
        work(team, 0, stage);
        wait_for_change(team, stage);
    }
    fesetenv(&callers_environment);
    pthread_mutex_unlock(&team->running);
}

struct team *team_start(int64_t threads, const int64_t *cpus) {
    size_t bytes = sizeof(struct team) + (size_t)threads * sizeof(struct member);
    struct team *team = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!team) return NULL;
    *team = (struct team){.stage = IDLE, .size = 1, .callers_cpu = cpus ? cpus[0] : -1, .process = getpid()};
    pthread_mutex_init(&team->running, NULL);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (int64_t i = 0; i < threads; i++) team->members[i] = (struct member){.team = team, .index = i};
    for (int64_t i = 1; i < threads; i++, team->size++) {
        if (pthread_create(&team->members[i].thread, &attributes, member_main, &team->members[i])) break;
        if (cpus) pin(team->members[i].thread, cpus[i]);
    }
    pthread_attr_destroy(&attributes);
    if (team->size == threads) return team;
    team_stop(team);
    return NULL;
}

void team_stop(struct team *team) {
    if (team->process != getpid()) return;
    pthread_mutex_lock(&team->running);
    atomic_store(&team->stopping, 1);
    atomic_fetch_add(&team->signal, 1);
    syscall(SYS_futex, &team->signal, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    for (int64_t i = 1; i < team->size; i++) pthread_join(team->members[i].thread, NULL);
    pthread_mutex_unlock(&team->running);
    pthread_mutex_destroy(&team->running);
    free(team);
}

// Waiting for other processes.
#pragma once
#include "ops.h"

static inline uint32_t counted(const struct counter *counter) { return __atomic_load_n(&counter->count, __ATOMIC_ACQUIRE); }

// See struct meet_op. Sets end->failed when the wait was given up.
void meet(const struct meet_op *op);

// Sleep for so long.
void take_time(int64_t ns);

// Let everybody know that no exchange goes on: sets *aborted and wakes all who sleep at `counters`.
void give_up(uint32_t *aborted, struct counter *counters, int64_t count);

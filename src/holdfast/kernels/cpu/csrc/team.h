// A team of threads that runs step programs.
#pragma once
#include "ops.h"

struct team;

// `threads` - 1 threads beside the caller's; cpus[i] is the core thread i is pinned to, or cpus is NULL. Thread 0 is who
// calls team_run first: pinned then and not before, since what loads the weights has inherited its cores. NULL if a
// thread could not be started.
struct team *team_start(int64_t threads, const int64_t *cpus);
void team_stop(struct team *team);  // after the run that is on

// Run the operations in order; returns when the last has ended. One caller at a time.
void team_run(struct team *team, const struct isa *isa, const struct op *ops, int64_t count, const struct batch *batch);

/* parallel.h - the only file that knows OpenMP. Without it everything runs in one thread. */
#ifndef GSGD_PARALLEL_H
#define GSGD_PARALLEL_H

#include <stdatomic.h>
#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* Seconds, where there are threads. */
static inline double clock_now(void) {
#ifdef _OPENMP
    return omp_get_wtime();
#else
    return 0;
#endif
}

/* Run body(context, leader) in up to `threads` threads; exactly one has leader = 1. */
static inline void run_parallel(int threads, void (*body)(void *, int), void *context) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(context, omp_get_thread_num() == 0);
        return;
    }
#endif
    (void)threads;
    body(context, 1);
}

/* Wait for the other threads of run_parallel, which was given as many. */
static inline void wait_for_all(int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
    (void)threads;
}

/* The next piece of shared work: pieces are handed out, so that a thread that is held up holds up nobody. */
static inline ptrdiff_t next_piece(atomic_ptrdiff_t *counter) {
    return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

#endif

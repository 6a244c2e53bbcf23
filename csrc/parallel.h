/* parallel.h - the only file that knows OpenMP. Without it everything runs in one thread. */
#ifndef GSGD_PARALLEL_H
#define GSGD_PARALLEL_H

#include <math.h>
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

/* Run body(context) in up to `threads` threads. */
static inline void run_parallel(int threads, void (*body)(void *), void *context) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(context);
        return;
    }
#endif
    (void)threads;
    body(context);
}

/* The next piece of shared work: pieces are handed out, so that a thread that is held up holds up nobody. */
static inline ptrdiff_t next_piece(atomic_ptrdiff_t *counter) {
    return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* What some work that is done again and again has taught about its threads; zero at first.
 *
 * Threads wait for each other, and one whose core another process has makes all others wait, for longer than
 * it would have saved. So several threads are used on credit. Against the time that one thread needs, several
 * earn what they save and spend what they lose, and each time that one thread works alone earns a 32nd of it:
 * enough for another try now and then. One thread is measured again after every 64 such times that several
 * have had; the time follows shorter ones at once and longer ones slowly, which may be accidents. The limits
 * of the credit are 32 times to lose after good ones, and 2^15 to wait after bad ones. Results never depend
 * on any of this. */
typedef struct {
    double one_thread; /* seconds that one thread needs */
    double credit;     /* seconds that several may still lose */
    double since;      /* seconds that several have had since one was measured */
} team;

static inline void learn(team *t, int threads, double seconds) {
    if (threads == 1) {
        double slower = fmin((3 * t->one_thread + seconds) / 4, 1.25 * t->one_thread);
        t->one_thread = t->one_thread > 0 && seconds > t->one_thread ? slower : seconds;
        t->credit += seconds / 32;
        t->since = 0;
    } else {
        t->since += seconds;
        if (t->one_thread > 0)
            t->credit += t->one_thread - seconds;
    }
    t->credit = fmax(-1024 * t->one_thread, fmin(32 * t->one_thread, t->credit));
}

/* Run body(context) in up to `threads` threads, or in one if more have not paid. */
static inline void run_team(team *t, int threads, void (*body)(void *), void *context) {
    if (threads <= 1) {
        body(context);
        return;
    }
    int used = t->credit < 0 || t->since > 64 * t->one_thread ? 1 : threads;
    double begin = clock_now();
    run_parallel(used, body, context);
    learn(t, used, clock_now() - begin);
}

#endif

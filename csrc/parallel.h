/* parallel.h - the only file that knows OpenMP. Without it everything runs in one thread. */
#ifndef GSGD_PARALLEL_H
#define GSGD_PARALLEL_H

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

/* Seconds, where there are threads. */
static inline double clock_now(void) {
#ifdef _OPENMP
    return omp_get_wtime();
#else
    return 0;
#endif
}

#ifdef _OPENMP
static void *pass_gate(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* Start up to `wanted` threads that all wait at the gate; the last opens it. Returns how many. */
static inline int start_threads(int wanted, pthread_mutex_t *gate) {
    pthread_t thread;
    if (wanted <= 0 || pthread_create(&thread, NULL, pass_gate, gate) != 0) {
        pthread_mutex_unlock(gate);
        return 0;
    }
    int started = 1 + start_threads(wanted - 1, gate);
    pthread_join(thread, NULL);
    return started;
}
#endif

/* How many threads may be asked for, up to `wanted`: where OpenMP cannot make one, it ends the process. */
static inline int startable_threads(int wanted) {
#ifdef _OPENMP
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&gate);
    int started = start_threads(wanted - 1, &gate);
    pthread_mutex_destroy(&gate);
    return started == wanted - 1 ? wanted : started; /* if not all, leave some room */
#else
    return wanted;
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

/* What the repetitions of some work have taught about its threads; zero at first.
 *
 * Threads wait for each other. One whose core is taken by another process makes all others wait for longer
 * than they would have saved, so several threads work on credit. Compared with the time that one thread
 * needs, they earn what they save and spend what they lose. Each time that one thread works alone, a 32nd of
 * that is earned: enough for another try now and then. One thread is measured again once several have worked
 * for 64 times as long. Its time follows shorter measurements at once, and longer ones, which may be
 * accidents, slowly. In units of this time, the credit is at most 32 and at least -1024, so that after bad
 * tries the next comes within 2^15 repetitions. Results never depend on any of this. */
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

// See threads.h.

#include "threads.h"

#include <pthread.h>
#include <stddef.h>

enum { MOST_THREADS = 256 };

struct job {
    void (*task)(void *);
    void *argument;
};

// OpenMP's GOMP_parallel: the task, its argument, number of threads, flags.
typedef void (*pool)(void (*)(void *), void *, unsigned, unsigned);

static pool torch_threads = NULL;

static void *run(void *argument)
{
    struct job *job = argument;
    job->task(job->argument);
    return NULL;
}

// Use OpenMP's function from now on; NULL: don't, such as in a forked process, in which its threads don't exist.
void use_threads_of(pool function)
{
    torch_threads = function;
}

void in_parallel(void (*task)(void *), void *argument, int threads)
{
    struct job job = {task, argument};
    pthread_t others[MOST_THREADS];
    int running = 0;
    if (threads > 1 && torch_threads) {
        torch_threads(task, argument, (unsigned)threads, 0);
        return;
    }
    while (running < threads - 1 && running < MOST_THREADS && !pthread_create(&others[running], NULL, run, &job))
        running++;
    task(argument);
    while (running--)
        pthread_join(others[running], NULL);
}

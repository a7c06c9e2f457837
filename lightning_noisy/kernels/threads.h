// Threads for the kernels: torch's own, which are awake, where build.py found them; else new ones.

#ifndef THREADS_H
#define THREADS_H

// Runs the task in some threads at once, and waits for all. Each takes its share by itself.
void in_parallel(void (*task)(void *), void *argument, int threads);

#endif

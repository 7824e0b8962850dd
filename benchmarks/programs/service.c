/*
 * A service that says when it runs: writes "PID NANOSECONDS" (CLOCK_MONOTONIC) to FIFO, then does
 * nothing until it is killed.
 *
 * usage: service FIFO
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec now;
    char line[64];
    int fifo;

    clock_gettime(CLOCK_MONOTONIC, &now);
    if (argc != 2 || (fifo = open(argv[1], O_WRONLY)) < 0)
        return 1;
    snprintf(line, sizeof line, "%10d %20lld\n", (int)getpid(),
             now.tv_sec * 1000000000LL + now.tv_nsec);
    if (write(fifo, line, strlen(line)) < 0)
        return 1;
    close(fifo);
    for (;;)
        pause();
}

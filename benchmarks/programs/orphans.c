/*
 * Makes orphans as fast as it can: forks a child that forks a grandchild, COUNT times, and waits for
 * the children only. Then waits until PID 1 has reaped the grandchildren: until /proc shows as many
 * processes as at the start. Writes the seconds that took to FILE.
 *
 * usage: orphans COUNT FILE
 */
#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int processes(void)
{
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    int count = 0;

    while ((entry = readdir(proc)) != NULL)
        count += isdigit((unsigned char)entry->d_name[0]) != 0;
    closedir(proc);
    return count;
}

int main(int argc, char **argv)
{
    struct timespec start, end;
    char temporary[4096];
    FILE *file;
    int before, left;

    if (argc != 3)
        return 2;
    before = processes();
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (left = atoi(argv[1]); left > 0; left--) {
        pid_t child = fork();

        if (child == 0) {
            if (fork() < 0)
                _exit(1);
            _exit(0);
        }
        if (child < 0 || waitpid(child, NULL, 0) != child)
            return 1;
    }
    while (processes() > before)
        usleep(500);
    clock_gettime(CLOCK_MONOTONIC, &end);
    snprintf(temporary, sizeof temporary, "%s.new", argv[2]);
    file = fopen(temporary, "we");
    if (file == NULL)
        return 1;
    fprintf(file, "%.6f\n", end.tv_sec - start.tv_sec + (end.tv_nsec - start.tv_nsec) / 1e9);
    fclose(file);
    return rename(temporary, argv[2]) != 0;
}

/*
 * PID 1 of the initial RAM filesystem: loads the modules that the root filesystem and the host's
 * first calls need, mounts /dev/vda read-only and hands over to its /sbin/init. Knows no options.
 *
 * /modules names one module file per line, in the order to load them in. What follows a line
 * `later` is loaded by a child while the system already starts.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ROOT_DEVICE "/dev/vda"
#define ROOT "/root"

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
    struct timespec now;
    char text[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    clock_gettime(CLOCK_BOOTTIME, &now);
    dprintf(2, "[%5lld.%03ld] initrd: %s\n", (long long)now.tv_sec, now.tv_nsec / 1000000, text);
}

/* Nothing can be done without a root filesystem: says why and powers off. */
static void give_up(const char *what, const char *subject)
{
    say("cannot %s %s: %s; powering off", what, subject, strerror(errno));
    sync();
    reboot(RB_POWER_OFF);
    _exit(1); /* the kernel panics, which ends the VM too */
}

static void mount_or_give_up(const char *source, const char *target, const char *type,
                             unsigned long flags)
{
    if (mount(source, target, type, flags, NULL) != 0)
        give_up("mount", target);
}

static void load(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);

    if (file < 0 || (syscall(SYS_finit_module, file, "", 0) != 0 && errno != EEXIST))
        say("cannot load %s: %s", path, strerror(errno));
    if (file >= 0)
        close(file);
    unlink(path);
}

/* Returns when all are loaded, or, from `later` on, at once. */
static void load_modules(void)
{
    FILE *list = fopen("/modules", "re");
    char line[256];
    int child = 0;

    if (list == NULL)
        give_up("open", "/modules");
    while (fgets(line, sizeof line, list) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (strcmp(line, "later") == 0) {
            pid_t pid = fork();

            if (pid > 0)
                break;
            child = pid == 0; /* without a child they are loaded now: late, but there */
            if (child)
                nice(10); /* whoever waits for the VM waits for Python first */
        } else {
            load(line);
        }
    }
    if (child)
        _exit(0);
    fclose(list);
}

/* Virtio devices are there when their driver is, but a slow host may need a moment. */
static void mount_root(void)
{
    const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};

    for (int tries = 0; mount(ROOT_DEVICE, ROOT, "ext4", MS_RDONLY, NULL) != 0; tries++) {
        if ((errno != ENOENT && errno != ENXIO) || tries == 500)
            give_up("mount", ROOT_DEVICE);
        nanosleep(&pause, NULL);
    }
}

static void move(const char *from, const char *to)
{
    if (mount(from, to, NULL, MS_MOVE, NULL) != 0)
        give_up("move the mount", from);
}

int main(int argc, char **argv)
{
    (void)argc;
    mount_or_give_up("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC);
    mount_or_give_up("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC);
    mount_or_give_up("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC);
    load_modules();
    mount_root();
    move("/dev", ROOT "/dev");
    move("/proc", ROOT "/proc");
    move("/sys", ROOT "/sys");
    if (chdir(ROOT) != 0)
        give_up("enter", ROOT);
    move(".", "/");
    if (chroot(".") != 0 || chdir("/") != 0)
        give_up("enter", "the root filesystem");
    say("%s mounted", ROOT_DEVICE);
    execv("/sbin/init", argv);
    give_up("execute", "/sbin/init");
    return 1;
}

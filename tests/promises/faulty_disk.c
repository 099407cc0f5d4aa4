/* A disk that fails when told to: preloaded, it counts the calls that change files and spoils one of them.
 *
 * cc -shared -fPIC -O1 -o faulty_disk.so faulty_disk.c -ldl;  LD_PRELOAD=./faulty_disk.so python ...
 * arm(at, action, error): from now on calls are counted; call number `at` is spoilt (0: none is).
 *   KILL  the process ends there, as by a power cut or the kernel's killer
 *   FAIL  the call fails with `error`; later ones go well
 *   FULL  that call writes half of what it should; whatever takes room fails with `error` from then on
 * Calls on standard streams, pipes, sockets and devices are not counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, FAIL = 2, FULL = 3 };

static long calls, target;
static int armed, what, code;

void arm(long at, int action, int error) {
    calls = 0, target = at, what = action, code = error, armed = 1;
}

long counted(void) { return calls; }

/* 0: go on; -1: fail with errno set; 1: the first call on a disk that is full from now on. */
static int event(int takes_room) {
    if (!armed) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (target == 0 || number < target) return 0;
    if (what == KILL && number == target) kill(getpid(), SIGKILL), pause();
    if (what == FAIL && number == target) return errno = code, -1;
    if (what == FULL && takes_room) return number == target ? 1 : (errno = code, -1);
    return 0;
}

static int ordinary(int fd) {
    struct stat status;
    int kept = errno, found = fd > 2 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    errno = kept;
    return found;
}

#define REAL(type, name, ...)                                  \
    static type (*real)(__VA_ARGS__);                          \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...) {                         \
        REAL(int, name, const char *, int, ...);                         \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                    \
        if (WRITES(flags) && strncmp(path, "/dev/", 5) && event((flags & O_CREAT) != 0) < 0) return -1; \
        return real(path, flags, mode);                                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
    int name(int folder, const char *path, int flags, ...) {             \
        REAL(int, name, int, const char *, int, ...);                    \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                    \
        if (WRITES(flags) && strncmp(path, "/dev/", 5) && event((flags & O_CREAT) != 0) < 0) return -1; \
        return real(folder, path, flags, mode);                          \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                      \
    FILE *name(const char *path, const char *mode) {                     \
        REAL(FILE *, name, const char *, const char *);                  \
        if (strpbrk(mode, "wa+") && event(1) < 0) return NULL;           \
        return real(path, mode);                                         \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    int found = ordinary(fd) ? event(1) : 0;
    return found < 0 ? -1 : real(fd, data, found && size > 1 ? size / 2 : size);
}

#define PWRITE(name, offset_type)                                        \
    ssize_t name(int fd, const void *data, size_t size, offset_type at) { \
        REAL(ssize_t, name, int, const void *, size_t, offset_type);     \
        int found = ordinary(fd) ? event(1) : 0;                         \
        return found < 0 ? -1 : real(fd, data, found && size > 1 ? size / 2 : size, at); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    int found = ordinary(fd) ? event(1) : 0;
    return found < 0 ? -1 : real(fd, parts, found && count > 1 ? count / 2 : count);
}

#define SENDFILE(name, offset_type)                                      \
    ssize_t name(int target_fd, int source, offset_type *at, size_t size) { \
        REAL(ssize_t, name, int, int, offset_type *, size_t);            \
        int found = ordinary(target_fd) ? event(1) : 0;                  \
        return found < 0 ? -1 : real(target_fd, source, at, found && size > 1 ? size / 2 : size); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int source, off64_t *from, int target_fd, off64_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    int found = event(1);
    return found < 0 ? -1 : real(source, from, target_fd, to, found && size > 1 ? size / 2 : size, flags);
}

/* Calls that either fail or are made as they are. */
#define PLAIN(room, type, name, declared, given, ...)                    \
    type name declared {                                                 \
        REAL(type, name, __VA_ARGS__);                                   \
        return event(room) < 0 ? -1 : real given;                        \
    }
#define PLAIN_FD(room, type, name, declared, given, ...)                 \
    type name declared {                                                 \
        REAL(type, name, __VA_ARGS__);                                   \
        return ordinary(fd) && event(room) < 0 ? -1 : real given;        \
    }

PLAIN_FD(0, int, fdatasync, (int fd), (fd), int)
PLAIN_FD(1, int, ftruncate, (int fd, off_t size), (fd, size), int, off_t)
PLAIN_FD(1, int, ftruncate64, (int fd, off64_t size), (fd, size), int, off64_t)
PLAIN(0, int, rename, (const char *a, const char *b), (a, b), const char *, const char *)
PLAIN(0, int, renameat, (int i, const char *a, int j, const char *b), (i, a, j, b), int, const char *, int,
      const char *)
PLAIN(0, int, renameat2, (int i, const char *a, int j, const char *b, unsigned f), (i, a, j, b, f), int,
      const char *, int, const char *, unsigned)
PLAIN(1, int, link, (const char *a, const char *b), (a, b), const char *, const char *)
PLAIN(1, int, linkat, (int i, const char *a, int j, const char *b, int f), (i, a, j, b, f), int, const char *,
      int, const char *, int)
PLAIN(1, int, mkdir, (const char *a, mode_t mode), (a, mode), const char *, mode_t)
PLAIN(1, int, mkdirat, (int i, const char *a, mode_t mode), (i, a, mode), int, const char *, mode_t)
PLAIN(0, int, unlink, (const char *a), (a), const char *)
PLAIN(0, int, unlinkat, (int i, const char *a, int f), (i, a, f), int, const char *, int)
PLAIN(0, int, rmdir, (const char *a), (a), const char *)
PLAIN(0, int, chmod, (const char *a, mode_t mode), (a, mode), const char *, mode_t)

/* Folders are flushed, too. */
int fsync(int fd) {
    REAL(int, fsync, int);
    return event(0) < 0 ? -1 : real(fd);
}

/* Preloaded into a Python process: counts every call that changes a file, and dies at a chosen one.
 *
 * A write is two points: before it, and with half of it done. Any other call is one, before it. After a
 * call is before the next, so between them they leave every state that a kill -9 can leave. System calls
 * are made directly, without looking up the C library's own functions.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, WRITE, FSYNC, RENAME, UNLINK, MKDIR, TRUNCATE };

enum { MOST = 4096 };

static atomic_long chosen, seen; /* chosen 0: not counting; beyond the last: counting only */
static unsigned char kinds[MOST];

void kill_at(long point) { chosen = point; }
long kill_points(void) { return seen; }
int kill_point_kind(long point) { return kinds[point]; } /* the first is 1 */

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int is_chosen(enum kind kind) {
    if (!chosen) return 0;
    long point = ++seen;
    if (point >= MOST) die();
    kinds[point] = kind;
    return point == chosen;
}

static void point(enum kind kind) {
    if (is_chosen(kind)) die();
}

static int is_file(int fd) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
}

ssize_t write(int fd, const void *data, size_t size) {
    if (is_file(fd)) {
        point(WRITE);
        if (is_chosen(WRITE)) {
            syscall(SYS_write, fd, data, size / 2);
            die();
        }
    }
    return syscall(SYS_write, fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
    point(WRITE);
    return syscall(SYS_pwrite64, fd, data, size, offset);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (is_file(fd)) point(WRITE);
    return syscall(SYS_writev, fd, parts, count);
}

int fsync(int fd) {
    point(FSYNC);
    return syscall(SYS_fsync, fd);
}
int fdatasync(int fd) {
    point(FSYNC);
    return syscall(SYS_fdatasync, fd);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    point(RENAME);
    return syscall(SYS_renameat2, from_fd, from, to_fd, to, 0);
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int fd, const char *path, int flags) {
    point(UNLINK);
    return syscall(SYS_unlinkat, fd, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int fd, const char *path, mode_t mode) {
    point(MKDIR);
    return syscall(SYS_mkdirat, fd, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int ftruncate64(int fd, off_t size) {
    point(TRUNCATE);
    return syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int open_at(int fd, const char *path, int flags, mode_t mode) {
    if (flags & (O_CREAT | O_TRUNC)) point(OPEN);
    return syscall(SYS_openat, fd, path, flags, mode);
}

/* The mode is there only with O_CREAT or O_TMPFILE. */
#define READ_MODE(flags, mode)                       \
    mode_t mode = 0;                                 \
    if ((flags) & (O_CREAT | O_TMPFILE)) {           \
        va_list rest;                                \
        va_start(rest, flags);                       \
        mode = va_arg(rest, mode_t);                 \
        va_end(rest);                                \
    }

int open(const char *path, int flags, ...) {
    READ_MODE(flags, mode)
    return open_at(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    READ_MODE(flags, mode)
    return open_at(AT_FDCWD, path, flags, mode);
}
int openat(int fd, const char *path, int flags, ...) {
    READ_MODE(flags, mode)
    return open_at(fd, path, flags, mode);
}
int openat64(int fd, const char *path, int flags, ...) {
    READ_MODE(flags, mode)
    return open_at(fd, path, flags, mode);
}

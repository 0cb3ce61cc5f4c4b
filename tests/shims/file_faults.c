/* Preloaded into a process: its calls on files below one directory are late, or fail, as a file system of
 * somebody else's might have them. Beyond that directory nothing changes.
 *
 * Set by the environment when the process starts, or at any time by file_faults_set. What it is told is one
 * text, in lines:
 *
 *     below DIRECTORY
 *     latency MICROSECONDS SEED
 *     fail CALL ERRNO FIRST COUNT before|after PATTERN
 *
 * `latency`: each call waits for 0 to MICROSECONDS, drawn from SEED, the process and the number of the call.
 * `fail`: of the calls named CALL whose path matches PATTERN (fnmatch, * matches / too; of a call with two
 * paths, either), COUNT of them from the FIRST (1 is the first) on fail with ERRNO; COUNT 0: all from there on.
 * `after`: the call is made all the same, and only its answer is wrong, as when a reply was lost and the retry
 * finds the work done.
 *
 * System calls are made directly, as in tests/fault/kill_points.c.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { RULES = 32, LONGEST = 512 };

struct rule {
    char call[16], when[8], pattern[LONGEST];
    int error;
    long first, count;
    atomic_long seen;
};

static char below[PATH_MAX];
static long latency, seed;
static struct rule rules[RULES];
static int rule_count;
static atomic_long calls, failures;

long file_faults_calls(void) { return calls; }       /* below the directory, in this process and its parents */
long file_faults_failures(void) { return failures; } /* of them, by a rule */

/* Returns the number of lines understood; those that are not are passed over. */
int file_faults_set(const char *text) {
    int understood = 0;
    below[0] = 0, latency = seed = 0, rule_count = 0, calls = failures = 0;
    for (const char *line = text; *line;) {
        const char *end = strchrnul(line, '\n');
        char copy[PATH_MAX + 64];
        snprintf(copy, sizeof copy, "%.*s", (int)(end - line), line);
        struct rule *rule = &rules[rule_count];
        if (sscanf(copy, "below %4095[^\n]", below) == 1 || sscanf(copy, "latency %ld %ld", &latency, &seed) == 2) {
            understood++;
        } else if (rule_count < RULES && sscanf(copy, "fail %15s %d %ld %ld %7s %511[^\n]", rule->call, &rule->error,
                                                &rule->first, &rule->count, rule->when, rule->pattern) == 6) {
            rule->seen = 0;
            rule_count++, understood++;
        }
        line = *end ? end + 1 : end;
    }
    return understood;
}

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("FILE_FAULTS");
    if (text) file_faults_set(text);
}

static unsigned long mixed(unsigned long x) { /* splitmix64 */
    x += 0x9e3779b97f4a7c15ul;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
    return x ^ (x >> 31);
}

static int is_below(const char *path) {
    size_t length = strlen(below);
    return length && !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

/* The path that a call is about, absolute; its links are not followed. */
static void absolute(int fd, const char *path, char *out) {
    char base[PATH_MAX / 2] = "";
    if (path && path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (fd == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) < 0) base[0] = 0;
    } else {
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, name, base, sizeof base - 1);
        base[size > 0 ? size : 0] = 0;
    }
    if (path && *path && strlen(path) < PATH_MAX / 2)
        snprintf(out, PATH_MAX, "%s/%s", strcmp(base, "/") ? base : "", path);
    else
        snprintf(out, PATH_MAX, "%s", base);
}

struct verdict {
    int error, after;
};

/* What is to become of a call on one path or two. */
static struct verdict judge(const char *call, int fd, const char *path, int other_fd, const char *other) {
    struct verdict verdict = {0, 0};
    int kept = errno;
    if (!below[0]) return verdict;
    char first[PATH_MAX], second[PATH_MAX] = "";
    absolute(fd, path, first);
    if (other) absolute(other_fd, other, second);
    if (is_below(first) || is_below(second)) {
        long number = ++calls;
        if (latency > 0) {
            unsigned long drawn = mixed(mixed(mixed(seed) ^ (unsigned long)getpid()) ^ (unsigned long)number);
            long microseconds = (long)(drawn % (unsigned long)(latency + 1));
            struct timespec pause = {microseconds / 1000000, microseconds % 1000000 * 1000};
            nanosleep(&pause, NULL);
        }
        for (int at = 0; at < rule_count && !verdict.error; at++) {
            struct rule *rule = &rules[at];
            if (strcmp(rule->call, call)) continue;
            if (fnmatch(rule->pattern, first, 0) && (!other || fnmatch(rule->pattern, second, 0))) continue;
            long seen = ++rule->seen;
            if (seen >= rule->first && (!rule->count || seen < rule->first + rule->count)) {
                verdict.error = rule->error, verdict.after = !strcmp(rule->when, "after");
                failures++;
            }
        }
    }
    errno = kept;
    return verdict;
}

/* Make the call, unless it is to fail before. */
#define ANSWER(judged, ...)                                     \
    do {                                                        \
        struct verdict said = (judged);                         \
        if (said.error && !said.after) {                        \
            errno = said.error;                                 \
            return -1;                                          \
        }                                                       \
        long result = (__VA_ARGS__);                            \
        if (said.error && result >= 0) {                        \
            errno = said.error;                                 \
            return -1;                                          \
        }                                                       \
        return result;                                          \
    } while (0)
#define ONE(name, fd, path) judge(name, fd, path, 0, NULL)

static int open_at(int fd, const char *path, int flags, mode_t mode) {
    ANSWER(ONE("open", fd, path), syscall(SYS_openat, fd, path, flags, mode));
}

/* The mode is there only with O_CREAT or O_TMPFILE. */
#define OPEN(...)                                                                      \
    {                                                                                  \
        mode_t mode = 0;                                                               \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                     \
            va_list rest;                                                              \
            va_start(rest, flags);                                                     \
            mode = va_arg(rest, mode_t);                                               \
            va_end(rest);                                                              \
        }                                                                              \
        return open_at(__VA_ARGS__, path, flags, mode);                                \
    }
int open(const char *path, int flags, ...) OPEN(AT_FDCWD)
int open64(const char *path, int flags, ...) OPEN(AT_FDCWD)
int openat(int fd, const char *path, int flags, ...) OPEN(fd)
int openat64(int fd, const char *path, int flags, ...) OPEN(fd)

static int stat_at(int fd, const char *path, void *status, int flags) {
    ANSWER(ONE("stat", fd, path), syscall(SYS_newfstatat, fd, path, status, flags));
}
int stat(const char *path, struct stat *status) { return stat_at(AT_FDCWD, path, status, 0); }
int stat64(const char *path, struct stat64 *status) { return stat_at(AT_FDCWD, path, status, 0); }
int lstat(const char *path, struct stat *status) { return stat_at(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW); }
int lstat64(const char *path, struct stat64 *status) { return stat_at(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW); }
int fstatat(int fd, const char *path, struct stat *status, int flags) { return stat_at(fd, path, status, flags); }
int fstatat64(int fd, const char *path, struct stat64 *status, int flags) { return stat_at(fd, path, status, flags); }
int statx(int fd, const char *path, int flags, unsigned mask, struct statx *status) {
    ANSWER(ONE("stat", fd, path), syscall(SYS_statx, fd, path, flags, mask, status));
}
int faccessat(int fd, const char *path, int mode, int flags) {
    ANSWER(ONE("stat", fd, path), flags ? syscall(SYS_faccessat2, fd, path, mode, flags) : syscall(SYS_faccessat, fd, path, mode));
}
int access(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    ANSWER(judge(flags ? "renameat2" : "rename", from_fd, from, to_fd, to),
           syscall(SYS_renameat2, from_fd, from, to_fd, to, flags));
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) { return renameat2(from_fd, from, to_fd, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    ANSWER(judge("link", from_fd, from, to_fd, to), syscall(SYS_linkat, from_fd, from, to_fd, to, flags));
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int fd, const char *path, int flags) {
    ANSWER(ONE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", fd, path), syscall(SYS_unlinkat, fd, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int fd, const char *path, mode_t mode) {
    ANSWER(ONE("mkdir", fd, path), syscall(SYS_mkdirat, fd, path, mode));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int fsync(int fd) { ANSWER(ONE("fsync", fd, NULL), syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { ANSWER(ONE("fsync", fd, NULL), syscall(SYS_fdatasync, fd)); }
int flock(int fd, int operation) { ANSWER(ONE("flock", fd, NULL), syscall(SYS_flock, fd, operation)); }

/* No latency of their own: a file is read ahead, and a write is buffered. */
static int has_rule(const char *call) {
    for (int at = 0; at < rule_count; at++)
        if (!strcmp(rules[at].call, call)) return 1;
    return 0;
}
ssize_t read(int fd, void *data, size_t size) {
    if (!has_rule("read")) return syscall(SYS_read, fd, data, size);
    ANSWER(ONE("read", fd, NULL), syscall(SYS_read, fd, data, size));
}
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    if (!has_rule("read")) return syscall(SYS_pread64, fd, data, size, offset);
    ANSWER(ONE("read", fd, NULL), syscall(SYS_pread64, fd, data, size, offset));
}
ssize_t pread(int fd, void *data, size_t size, off_t offset) { return pread64(fd, data, size, offset); }
ssize_t write(int fd, const void *data, size_t size) {
    if (!has_rule("write")) return syscall(SYS_write, fd, data, size);
    ANSWER(ONE("write", fd, NULL), syscall(SYS_write, fd, data, size));
}

/* A directory comes over in a few replies, the first with its opening. */
#define OPEN_DIRECTORY(name, type, fd, path)                            \
    {                                                                   \
        struct verdict said = ONE("opendir", fd, path);                 \
        if (said.error) {                                               \
            errno = said.error;                                         \
            return NULL;                                                \
        }                                                               \
        DIR *(*real)(type) = (DIR * (*)(type)) dlsym(RTLD_NEXT, name);  \
        return real(which);                                             \
    }
DIR *opendir(const char *which) OPEN_DIRECTORY("opendir", const char *, AT_FDCWD, which)
DIR *fdopendir(int which) OPEN_DIRECTORY("fdopendir", int, which, NULL)

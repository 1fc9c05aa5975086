/* Counts the calls of CUDA's runtime that make the host wait. Loaded before a program by LD_PRELOAD; needs no CUDA header.
 *
 *     cc -O2 -shared -fPIC -o libsync_counter.so sync_counter.c -ldl
 *     HRA_SYNC_LOG=FILE LD_PRELOAD=./libsync_counter.so PROGRAM ..
 *
 * FILE holds five 64-bit numbers: waits for a stream, for the device, for an event, copies that wait (cudaMemcpy), and copies
 * to the host that were only begun (cudaMemcpyAsync; where the memory is not pinned they wait too). The file is mapped, so
 * that every call is in it at once, also of a process that is killed. A process that forks counts into the file that the
 * variable names when it first calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { STREAM, DEVICE, EVENT, COPY, COPY_TO_HOST, COUNTERS };
enum { DEVICE_TO_HOST = 2 };
enum { UNKNOWN_ERROR = 999 };

static uint64_t unwritten[COUNTERS];
static uint64_t *counters = unwritten;
static pid_t owner;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void open_log(void)
{
    const char *path = getenv("HRA_SYNC_LOG");
    counters = unwritten;
    owner = getpid();
    if (!path)
        return;
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (file < 0)
        return;
    if (ftruncate(file, sizeof unwritten) == 0) {
        void *map = mmap(NULL, sizeof unwritten, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (map != MAP_FAILED)
            counters = map;
    }
    close(file);
}

static void count(int which)
{
    pthread_mutex_lock(&lock);
    if (owner != getpid())
        open_log();
    counters[which]++;
    pthread_mutex_unlock(&lock);
}

/* The runtime's own function: it comes after this library, or was opened later and privately. */
static void *own(const char *name)
{
    static const char *const libraries[] = {"libcudart.so.13", "libcudart.so.12"};
    void *found = dlsym(RTLD_NEXT, name);
    for (unsigned i = 0; !found && i < sizeof libraries / sizeof *libraries; i++) {
        void *library = dlopen(libraries[i], RTLD_LAZY | RTLD_NOLOAD);
        if (library)
            found = dlsym(library, name);
    }
    return found;
}

#define FORWARD(name, parameters, arguments, before)                                                                          \
    int name parameters                                                                                                       \
    {                                                                                                                         \
        static int(*next) parameters;                                                                                         \
        if (!next)                                                                                                            \
            next = (int(*) parameters)own(#name);                                                                             \
        before;                                                                                                               \
        return next ? next arguments : UNKNOWN_ERROR;                                                                         \
    }

FORWARD(cudaStreamSynchronize, (void *stream), (stream), count(STREAM))
FORWARD(cudaDeviceSynchronize, (void), (), count(DEVICE))
FORWARD(cudaEventSynchronize, (void *event), (event), count(EVENT))
FORWARD(cudaMemcpy, (void *to, const void *from, size_t size, int kind), (to, from, size, kind), count(COPY))
FORWARD(cudaMemcpyAsync, (void *to, const void *from, size_t size, int kind, void *stream), (to, from, size, kind, stream),
        if (kind == DEVICE_TO_HOST) count(COPY_TO_HOST))

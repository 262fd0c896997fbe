/* What the fake engine and the load generator share: a clock, a growing buffer, a histogram of times, waiting in nanoseconds. */
#ifndef PAWL_BENCH_COMMON_H
#define PAWL_BENCH_COMMON_H

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000ull
#define NS_PER_MS 1000000ull
#define NS_PER_US 1000ull

static inline uint64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * NS_PER_S + (uint64_t)at.tv_nsec;
}

static inline void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "wrong use");
    exit(2);
}

static inline void *allocate(void *old, size_t size) {
    void *new = realloc(old, size);
    if (!new) fail("memory");
    return new;
}

struct buffer {
    char *bytes;
    size_t length, capacity;
};

static inline void append(struct buffer *buffer, const void *bytes, size_t length) {
    if (buffer->length + length > buffer->capacity) {
        buffer->capacity = (buffer->length + length) * 2;
        buffer->bytes = allocate(buffer->bytes, buffer->capacity);
    }
    memcpy(buffer->bytes + buffer->length, bytes, length);
    buffer->length += length;
}

static inline void consume(struct buffer *buffer, size_t length) {
    buffer->length -= length;
    memmove(buffer->bytes, buffer->bytes + length, buffer->length);
}

/* Log-linear, as HdrHistogram: 64 steps to each power of two, so a value is known within 1.6 %. Values in nanoseconds. */
enum { STEPS_LOG2 = 6, STEPS = 1 << STEPS_LOG2, N_BUCKETS = STEPS * 40 };

struct histogram {
    uint64_t counts[N_BUCKETS], n, largest;
    double sum;
};

static inline size_t bucket_of(uint64_t value) {
    if (value < STEPS) return value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - STEPS_LOG2;
    size_t bucket = (size_t)(shift + 1) * STEPS + (value >> shift) - STEPS;
    return bucket < N_BUCKETS ? bucket : N_BUCKETS - 1;
}

static inline uint64_t value_of(size_t bucket) {
    if (bucket < STEPS) return bucket;
    unsigned shift = (unsigned)(bucket / STEPS - 1);
    return ((bucket % STEPS + STEPS) << shift) + (1ull << shift) / 2;
}

static inline void record(struct histogram *histogram, uint64_t value) {
    histogram->counts[bucket_of(value)]++;
    histogram->n++;
    histogram->sum += (double)value;
    if (value > histogram->largest) histogram->largest = value;
}

static inline double quantile_us(const struct histogram *histogram, double share) {
    uint64_t wanted = (uint64_t)(share * (double)histogram->n), seen = 0;
    for (size_t bucket = 0; bucket < N_BUCKETS; bucket++) {
        seen += histogram->counts[bucket];
        if (seen <= wanted) continue;
        uint64_t value = value_of(bucket); /* the middle of the bucket, which may lie beyond what was seen */
        return (double)(value < histogram->largest ? value : histogram->largest) / 1000.0;
    }
    return (double)histogram->largest / 1000.0;
}

static inline void print_histogram(const char *name, const struct histogram *histogram) {
    printf("\"%s\": {\"n\": %llu, \"mean_us\": %.2f, \"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, "
           "\"p999_us\": %.2f, \"max_us\": %.2f}",
           name, (unsigned long long)histogram->n, histogram->n ? histogram->sum / (double)histogram->n / 1000.0 : 0.0,
           quantile_us(histogram, 0.5), quantile_us(histogram, 0.9), quantile_us(histogram, 0.99),
           quantile_us(histogram, 0.999), (double)histogram->largest / 1000.0);
}

/* epoll_wait counts milliseconds, which is too coarse for pacing; older kernels get it all the same. */
static inline int wait_for_events(int poll_fd, struct epoll_event *events, int size, int64_t timeout_ns) {
    struct timespec timeout = {timeout_ns / (int64_t)NS_PER_S, timeout_ns % (int64_t)NS_PER_S};
    int n = (int)syscall(SYS_epoll_pwait2, poll_fd, events, size, timeout_ns < 0 ? NULL : &timeout, NULL, 0);
    if (n < 0 && errno == ENOSYS) n = epoll_wait(poll_fd, events, size, timeout_ns < 0 ? -1 : (int)(timeout_ns / 1000000));
    if (n < 0 && errno != EINTR) fail("epoll");
    return n < 0 ? 0 : n;
}

/* Many descriptors; no SIGPIPE; no life after whoever started us. */
static inline void prepare_process(void) {
    struct rlimit limit;
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

#endif

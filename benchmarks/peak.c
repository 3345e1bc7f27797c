/* The machine's peak of fused multiply-adds, single precision, and of bfloat16 dot products where it has them.
 *
 * peak THREADS WINDOWS SECONDS prints one line per instruction: its name and the best FLOP/s of all threads together over
 * the windows. Every thread runs chains of independent accumulators, enough to hide the latency of the
 * instruction, on registers alone. Compiled with -march=native and -ffp-contract=fast.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define NAME "FMA (AVX-512)"
#elif defined(__AVX2__) && defined(__FMA__)
#define BYTES 32
#define NAME "FMA (AVX2)"
#else
#define BYTES 16
#define NAME "multiply-add (128 bit)"
#endif
#define CHAINS 12
#define STEPS 4096

typedef float lanes __attribute__((vector_size(BYTES)));

static pthread_barrier_t barrier;
static volatile float sink; /* what is computed must be used */
static int bf16;            /* which instruction the threads run */
static int windows;
static double window_seconds;

/* Of this thread alone: another program that takes the core away for a while does not lower the machine's peak. */
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Each returns the floating-point operations it did. */
static double run_fma(void) {
    lanes a = {0}, b = {0}, c[CHAINS];
    a += 0.999f;
    b += 1e-3f;
    for (int i = 0; i < CHAINS; i++) c[i] = b * (float)i;
    for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) c[i] = c[i] * a + b;
        __asm__ volatile("" : "+x"(a), "+x"(b)); /* loop-invariant to the machine, not to the compiler */
    }
    lanes sum = c[0];
    for (int i = 1; i < CHAINS; i++) sum += c[i];
    sink = sum[0];
    return 2.0 * CHAINS * STEPS * (BYTES / sizeof(float));
}

#if defined(__AVX512BF16__)
static double run_bf16(void) {
    __m512 c[CHAINS];
    __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = a;
    for (int i = 0; i < CHAINS; i++) c[i] = _mm512_setzero_ps();
    for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) c[i] = _mm512_dpbf16_ps(c[i], a, b);
        __asm__ volatile("" : "+x"(a), "+x"(b));
    }
    __m512 sum = c[0];
    for (int i = 1; i < CHAINS; i++) sum = _mm512_add_ps(sum, c[i]);
    sink = _mm512_cvtss_f32(sum);
    return 4.0 * CHAINS * STEPS * 16;
}
#else
static double run_bf16(void) { return 0; }
#endif

/* Fills speeds[windows]: between two barriers every thread measures its own speed. */
static void *work(void *argument) {
    double *speeds = argument;
    for (int w = -1; w < windows; w++) { /* the first window warms up */
        double done = 0, start, passed;
        pthread_barrier_wait(&barrier);
        start = now();
        do {
            done += bf16 ? run_bf16() : run_fma();
            passed = now() - start;
        } while (passed < window_seconds);
        if (w >= 0) speeds[w] = done / passed;
    }
    return NULL;
}

static double best(int threads) {
    pthread_t *ids = malloc((size_t)threads * sizeof *ids);
    double *speeds = calloc((size_t)threads * (size_t)windows, sizeof *speeds), top = 0;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int t = 0; t < threads; t++) {
        if (pthread_create(&ids[t], NULL, work, speeds + (size_t)t * (size_t)windows)) exit(1);
    }
    for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
    pthread_barrier_destroy(&barrier);
    for (int w = 0; w < windows; w++) {
        double sum = 0;
        for (int t = 0; t < threads; t++) sum += speeds[t * windows + w];
        if (sum > top) top = sum;
    }
    free(ids);
    free(speeds);
    return top;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int threads = atoi(argv[1]);
    windows = atoi(argv[2]);
    window_seconds = atof(argv[3]);
    if (threads < 1 || windows < 1 || !(window_seconds > 0)) return 2;
    printf("float32\t%.6e\t%s\n", best(threads), NAME);
#if defined(__AVX512BF16__)
    bf16 = 1;
    printf("bfloat16\t%.6e\tbfloat16 dot product (AVX-512)\n", best(threads));
#endif
    return 0;
}

/* Measures the machine's peak rate of single-precision fused multiply-adds, and of bfloat16 dot products if it has them.
 *
 * A shared library that does a given amount of work on a given number of threads. It uses only registers, and enough
 * independent accumulators to hide the instruction's latency. Compiled with -march=native and -ffp-contract=fast.
 */
#include <pthread.h>
#include <stdlib.h>
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

static volatile float sink; /* uses the results, so that the compiler keeps the computation */

/* These functions return the number of floating-point operations that they did. */
static double run_fma(void) {
    lanes a = {0}, b = {0}, c[CHAINS];
    a += 0.999f;
    b += 1e-3f;
    for (int i = 0; i < CHAINS; i++) c[i] = b * (float)i;
    for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) c[i] = c[i] * a + b;
        __asm__ volatile("" : "+x"(a), "+x"(b)); /* hides from the compiler that a and b are loop-invariant */
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
#endif

typedef double (*kernel)(void);
struct task {
    kernel run;
    long repeats;
    double done;
};

static void *work(void *argument) {
    struct task *task = argument;
    task->done = 0;
    for (long r = 0; r < task->repeats; r++) task->done += task->run();
    return NULL;
}

const char *peak_name(int bf16) {
#if defined(__AVX512BF16__)
    if (bf16) return "bfloat16 dot product (AVX-512)";
#endif
    return bf16 ? "" : NAME; /* empty: there is no such instruction */
}

/* Returns the number of floating-point operations; 0 if a thread could not be created. */
double peak_work(int threads, int bf16, long repeats) {
    kernel run = run_fma;
    struct task *tasks = calloc((size_t)threads, sizeof *tasks);
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    double done = 0;
    int started = 1;
#if defined(__AVX512BF16__)
    if (bf16) run = run_bf16;
#else
    (void)bf16;
#endif
    if (!tasks || !ids) started = 0;
    for (int t = 0; t < threads && started; t++) tasks[t] = (struct task){run, repeats, 0};
    if (started) {
        for (; started < threads; started++) {
            if (pthread_create(&ids[started], NULL, work, &tasks[started])) break;
        }
        work(&tasks[0]);
        for (int t = 1; t < started; t++) pthread_join(ids[t], NULL);
        if (started == threads) {
            for (int t = 0; t < threads; t++) done += tasks[t].done;
        }
    }
    free(ids);
    free(tasks);
    return done;
}

/* Each kernel is compiled for three kinds of processor; the best one that runs here is taken. */
#ifndef VITDS_PROCESSOR_H
#define VITDS_PROCESSOR_H

#if defined(__x86_64__) && !defined(VITDS_PLAIN)
#define FOR_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define FOR_256 __attribute__((target("avx2,fma")))
static inline int register_bits(void) {
    int has_512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512dq");
    int has_256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has_512 ? 512 : has_256 ? 256 : 128;
}
#else
#define FOR_512
#define FOR_256
static inline int register_bits(void) { return 128; }
#endif

#endif

// One source, several instruction sets: the loader picks the best clone that the machine runs.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(SER_FAST_PORTABLE)
#define SER_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SER_FAST_CLONES
#endif

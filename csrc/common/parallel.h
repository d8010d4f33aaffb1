// Divides a range of independent tasks among OpenMP threads, which are those of torch once torch is imported.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace litevae {

// Calls body(begin, end) on contiguous, nearly equal parts of [0, count). It has internal linkage, because
// each instruction set compiles its own copy.
template <class Body>
static inline void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      body(count * rank / team, count * (rank + 1) / team);
    }
    return;
  }
#endif
  if (count > 0) body(int64_t{0}, count);
}

}  // namespace litevae

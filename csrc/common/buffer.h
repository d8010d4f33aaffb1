// Scratch memory on the CPU, and arithmetic of sizes. Everything has internal linkage, because it is compiled
// once per instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace litevae {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(static_cast<char*>(std::malloc(static_cast<size_t>(bytes) + 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
    next_ = data_ + (64 - reinterpret_cast<uintptr_t>(data_) % 64) % 64;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += count * static_cast<int64_t>(sizeof(T));
    return taken;
  }

 private:
  char *data_, *next_;
};

}  // namespace
}  // namespace litevae

// A program that runs the float32 convolution on tensors from its standard input, so that it can be tested on
// CPUs other than the host's. For each case it reads `silu`, `transposed`, ten numbers per tensor (offset of
// the data in bytes or -1 if the tensor is missing, dtype, four sizes, four strides) and the size of the
// memory in bytes, all as int64, and then the memory. It writes the memory with y in it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/conv3x3/float32.cpp"

namespace {

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

litevae::TensorView view(const int64_t* numbers, char* memory) {
  litevae::TensorView t{};
  if (numbers[0] < 0) return t;
  t.data = memory + numbers[0], t.dtype = static_cast<litevae::DType>(numbers[1]);
  for (int i = 0; i < 4; ++i) t.size[i] = numbers[2 + i], t.stride[i] = numbers[6 + i];
  return t;
}

}  // namespace

int main() {
  int64_t head[2 + 5 * 10 + 1];
  while (read(head, sizeof head)) {
    std::vector<char> memory(static_cast<size_t>(head[52]));
    if (!read(memory.data(), memory.size())) return EXIT_FAILURE;
    litevae::TensorView t[5];
    for (int i = 0; i < 5; ++i) t[i] = view(head + 2 + 10 * i, memory.data());
    litevae::LITEVAE_ISA::conv3x3_float32_forward(
        {t[0], {}, head[0] != 0, t[1], head[1] != 0, t[2], t[3], t[4]}, 1);
    std::fwrite(memory.data(), 1, memory.size(), stdout);
  }
  return EXIT_SUCCESS;
}

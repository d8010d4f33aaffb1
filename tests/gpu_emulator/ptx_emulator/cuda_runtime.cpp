// The part of the CUDA runtime that nvcc's host code and csrc call, on the emulated GPU. Device memory is
// host memory, and a launch returns when the kernel has ended.
#include <cstring>
#include <map>
#include <string>

#include "cluster.h"
#include "emulator.h"

namespace {

enum Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kInvalidFunction = 98,
  kInvalidDevice = 101,
  kLaunchFailure = 719,
  kNotSupported = 801
};
using Stream = void*;
struct dim3 {
  unsigned x, y, z;
};

struct Kernel {
  int module;
  std::string name;
  int64_t granted = 0;          // bytes of dynamic shared memory, if they were requested
  bool large_clusters = false;  // whether clusters that not every GPU has were requested
};
struct Configuration {
  dim3 grid, block;
  size_t shared;
  Stream stream;
};

// cudaLaunchAttribute and cudaLaunchConfig_t.
struct Attribute {
  int id, unused;
  unsigned value[16];
};
struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared;
  Stream stream;
  const Attribute* attributes;
  unsigned count;
};

std::map<const void*, Kernel> kernels;  // by the address of the host function
std::vector<Configuration> configurations;
std::string load_error, last_text;
int last_error = kSuccess;

constexpr int64_t kUnrequestedShared = 48 * 1024;
constexpr int kMaxDynamicSharedAttribute = 8, kNonPortableClusterAttribute = 14;
constexpr int kClusterDimension = 4;
// The numbers of an H200, by cudaDeviceAttr: multiprocessors, shared memory per block, clusters.
const std::map<int, int> kDeviceAttributes{{16, 132}, {97, static_cast<int>(ptx::kMostShared)}, {120, 1}};

int set_error(int error, const std::string& text) {
  last_text = text;
  return last_error = error;
}

template <class T>
T read(const char* from, size_t offset) {
  T value;
  memcpy(&value, from + offset, sizeof(T));
  return value;
}

// Loads the PTX of a fat binary: a header, and entries with headers of their own.
int load_fat_binary(const char* data) {
  constexpr uint16_t kPtx = 1;
  const char* entry = data + read<uint16_t>(data, 6);
  const char* const end = entry + read<uint64_t>(data, 8);
  int module = -1;
  while (entry < end) {
    const uint32_t header = read<uint32_t>(entry, 4);
    const uint64_t size = read<uint64_t>(entry, 8);
    const std::string text(entry + header, strnlen(entry + header, size));
    if (read<uint16_t>(entry, 0) == kPtx) {
      if (text.find(".version") == std::string::npos)
        ptx::fail("PTX is compressed: build with --no-compress");
      module = ptx::load(text);
    }
    entry += header + size;
  }
  return module;
}

std::vector<uint8_t> pack(const ptx::Function& entry, void** arguments) {
  std::vector<uint8_t> packed(entry.parameter_bytes);
  for (size_t i = 0; i < entry.parameters.size(); ++i)
    memcpy(packed.data() + entry.parameters[i].offset, arguments[i], entry.parameters[i].size);
  return packed;
}

}  // namespace

extern "C" {
#define API __attribute__((visibility("default")))

// --- What nvcc's host code calls.

API void** __cudaRegisterFatBinary(void* wrapper) {
  int* const module = new int(-1);  // for the life of the process, like the library
  try {
    *module = load_fat_binary(read<const char*>(static_cast<const char*>(wrapper), 8));
  } catch (const std::exception& problem) {
    load_error = problem.what();  // a constructor must not throw; a launch reports it
  }
  return reinterpret_cast<void**>(module);
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, void*, void*,
                                void*, void*, int*) {
  kernels[host] = {*reinterpret_cast<int*>(binary), name};
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 0; }

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, Stream stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, Stream* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *stream = c.stream;
  return kSuccess;
}
API int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}

API int cudaLaunchKernelExC(const LaunchConfiguration* launch, const void* function, void** arguments) {
  const auto found = kernels.find(function);
  if (found == kernels.end()) return set_error(kInvalidFunction, "invalid device function");
  const Kernel& kernel = found->second;
  if (kernel.module < 0) return set_error(kInvalidFunction, load_error);
  const dim3 &grid = launch->grid, &block = launch->block;
  const bool fits =
      grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!fits) return set_error(kInvalidConfiguration, "invalid configuration argument");
  const int64_t dynamic_shared = static_cast<int64_t>(launch->shared);
  const auto size = [](const unsigned* of) {
    return ptx::Size{static_cast<int>(of[0]), static_cast<int>(of[1]), static_cast<int>(of[2])};
  };
  ptx::Size cluster{1, 1, 1};
  for (unsigned i = 0; i < launch->count; ++i) {
    if (launch->attributes[i].id != kClusterDimension)
      return set_error(kNotSupported, "a launch attribute that is not emulated");
    cluster = size(launch->attributes[i].value);
  }
  if (cluster.count() > ptx::kPortableBlocks && !kernel.large_clusters)
    return set_error(kInvalidConfiguration, "more than 8 blocks per cluster, which were not requested");
  try {
    const ptx::Function& entry = ptx::entry_of(kernel.module, kernel.name);
    if (entry.static_shared + dynamic_shared > kUnrequestedShared && dynamic_shared > kernel.granted)
      return set_error(kInvalidValue, "more than 48 KB of shared memory, which was not requested");
    ptx::launch(kernel.module, kernel.name, size(&grid.x), size(&block.x), cluster, dynamic_shared,
                pack(entry, arguments));
  } catch (const std::exception& problem) {
    return set_error(kLaunchFailure, problem.what());
  }
  return kSuccess;
}
API int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                         Stream stream) {
  const LaunchConfiguration launch{grid, block, shared, stream, nullptr, 0};
  return cudaLaunchKernelExC(&launch, function, arguments);
}
API int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                           Stream stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// --- What csrc calls.

API int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const auto found = kDeviceAttributes.find(attribute);
  if (found == kDeviceAttributes.end()) return set_error(kNotSupported, "an attribute that is not emulated");
  *value = found->second;
  return kSuccess;
}
API int cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* function, const LaunchConfiguration*) {
  *blocks = kernels[function].large_clusters ? ptx::kMostBlocks : ptx::kPortableBlocks;
  return kSuccess;
}
API int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (attribute == kNonPortableClusterAttribute) {
    kernels[function].large_clusters = value != 0;
    return kSuccess;
  }
  if (attribute != kMaxDynamicSharedAttribute)
    return set_error(kNotSupported, "an attribute that is not emulated");
  if (value > ptx::kMostShared) return set_error(kInvalidValue, "more than 227 KB of shared memory");
  kernels[function].granted = value;
  return kSuccess;
}
API int cudaFuncGetAttributes(void*, const void*) { return kSuccess; }
API int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
API const char* cudaGetErrorString(int) { return last_text.c_str(); }
API int cudaSetDevice(int device) {
  return device == 0 ? kSuccess : set_error(kInvalidDevice, "invalid device ordinal");
}
}

// The entry points of GroupNorm+SiLU in clusters. CMakeLists.txt compiles this file for sm_90 and newer GPUs.
#include <map>
#include <mutex>

#include "../common/launch.cuh"
#include "clusters.cuh"
#include "plan.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "thread-block clusters need sm_90 or newer"
#endif

namespace litevae {
namespace group_norm_silu {
namespace {

constexpr int kPortable = 8, kMost = 16;  // blocks per cluster: on every GPU, and on some if it is asked for

// Lets a kernel have all the shared memory and all the blocks per cluster that a call may ask for.
void prepare(const void* kernel, int shared, int64_t blocks) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  if (blocks > kPortable)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
}

struct ClusterLaunch {
  cudaStream_t stream;

  template <class Body>
  void operator()(Body, const Pass& p) const {
    const auto kernel = reinterpret_cast<const void*>(&block_kernel<Body, Pass>);
    prepare(kernel, p.shared, p.chunks);
    const int64_t clusters = p.blocks / p.chunks, most = 0x7fffffff / p.chunks;
    const int64_t rows = (clusters + most - 1) / most, columns = (clusters + rows - 1) / rows;
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = static_cast<unsigned>(p.chunks);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(columns * p.chunks), static_cast<unsigned>(rows));
    config.blockDim = dim3(static_cast<unsigned>(p.threads));
    config.dynamicSmemBytes = static_cast<size_t>(p.shared), config.stream = stream;
    config.attrs = &size, config.numAttrs = 1;
    void* arguments[] = {const_cast<Pass*>(&p)};
    check(cudaLaunchKernelExC(&config, kernel, arguments), "the group_norm_silu kernel of clusters");
  }
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Card ask(int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  Card card{attribute(cudaDevAttrMultiProcessorCount, device),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), 0};
  if (attribute(cudaDevAttrClusterLaunch, device) == 0) return card;
  // All kernels have the same number of threads, and this one has the most shared memory of its own.
  using Body = Clustered<BFloat16, Kind::channels>;
  const auto kernel = reinterpret_cast<const void*>(&block_kernel<Body, Pass>);
  cudaFuncAttributes unused;
  if (cudaFuncGetAttributes(&unused, kernel) != cudaSuccess) {
    cudaGetLastError();  // The core was built for other GPUs with clusters.
    return card;
  }
  const int shared = static_cast<int>(card.shared) - static_cast<int>(sizeof(Body::Shared));
  prepare(kernel, shared, kMost);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMost), config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  int blocks = 0;
  check(cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &config),
        "cudaOccupancyMaxPotentialClusterSize");
  card.blocks = std::min(blocks, kMost);
  return card;
}

// Sets the division of a call; returns false if clusters do not serve it.
bool divide(Pass& p, Kind& kind, const Forward& call, const Card& card) {
  p = pass_of(call);
  if (p.batch * p.channels * p.pixels == 0) return false;
  kind = choose(p, call.in, false);
  return divide_among_clusters(p, call.in.x.dtype, kind, card);
}

}  // namespace
}  // namespace group_norm_silu

group_norm_silu::Card group_norm_silu_card(int device) {
  static std::mutex mutex;
  static std::map<int, group_norm_silu::Card> cards;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cards.find(device);
  return found != cards.end() ? found->second : cards[device] = group_norm_silu::ask(device);
}

group_norm_silu::Clusters group_norm_silu_clusters(const group_norm_silu::Forward& call,
                                                   const group_norm_silu::Card& card) {
  group_norm_silu::Pass p;
  group_norm_silu::Kind kind;
  if (!group_norm_silu::divide(p, kind, call, card)) return {};
  return {p.blocks / p.chunks, p.chunks, p.shared};
}

bool group_norm_silu_forward_clusters(const group_norm_silu::Forward& call, int device, void* stream) {
  using namespace group_norm_silu;
  Pass p;
  Kind kind;
  if (!divide(p, kind, call, group_norm_silu_card(device))) return false;
  check(cudaSetDevice(device), "cudaSetDevice");
  launch_streaming<Clustered>(p, call.in.x.dtype, kind, ClusterLaunch{static_cast<cudaStream_t>(stream)});
  return true;
}

}  // namespace litevae

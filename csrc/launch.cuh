// How CUDA kernels are started, and the little they share: streams, grids, packs of 16 bytes.
//
// With ADCERT_EMULATION the sources are plain C++: tests run them on the CPU under a model of warps, votes and
// barriers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(ADCERT_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

#include "namespace.h"
#include "tensors.h"

namespace adcert {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarp = 32;
constexpr unsigned kWhole = 0xffffffffu;  // every lane of a warp

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "adcert: ", what, " failed: ", cudaGetErrorString(error));
}

// Makes a tensor's device current, and knows torch's current stream there.
class Place {
 public:
#if defined(ADCERT_EMULATION)
  explicit Place(const Tensor&) {}
#else
  explicit Place(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "adcert: no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  // Enough blocks for `items` threads, but no more than fill the device a few times over: kernels loop.
  unsigned blocks(int64_t items) const {
    int processors = 0;
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_), "cudaDeviceGetAttribute");
    const int64_t wanted = (items + kThreads - 1) / kThreads, most = int64_t{32} * processors;
    return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, most));
  }

  // kernel(arguments...) on so many items.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t items, A... arguments) const {
    if (items <= 0) return;
    const unsigned grid = blocks(items);
#if defined(ADCERT_EMULATION)
    emulation::launch(grid, kThreads, 0, [&] { kernel(static_cast<P>(arguments)...); });
#else
    std::tuple<P...> values(static_cast<P>(arguments)...);
    std::apply(
        [&](auto&... value) {
          void* pointers[] = {static_cast<void*>(&value)...};
          check_cuda(
              cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads), pointers, 0, stream_),
              "a kernel's launch");
        },
        values);
#endif
  }

  void zero(void* data, int64_t bytes) const { fill(data, 0, bytes); }
  void fill(void* data, int byte, int64_t bytes) const {
    if (bytes > 0) check_cuda(cudaMemsetAsync(data, byte, static_cast<size_t>(bytes), stream_), "cudaMemsetAsync");
  }

 private:
  int device_ = 0;
#if !defined(ADCERT_EMULATION)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Loops of kernels run in step for all threads of a block, so that votes meet: a loop over items is
// for (Items<I> item(total); item.more(); item.next()) if (item.active()) ... item.index() ...
template <class I>
class Items {
 public:
  __device__ explicit Items(I total)
      : total_(total),
        base_(static_cast<I>(blockIdx.x) * static_cast<I>(kThreads)),
        step_(static_cast<I>(gridDim.x) * static_cast<I>(kThreads)) {}
  __device__ bool more() const { return base_ < total_; }
  __device__ void next() { base_ += step_; }
  __device__ I index() const { return base_ + static_cast<I>(threadIdx.x); }
  __device__ bool active() const { return index() < total_; }

 private:
  I total_, base_, step_;
};

// Whether indices up to `most`, and a few grids more, fit into int32.
inline bool fits_int(int64_t most) { return most < int64_t{1} << 30; }

// Whether the arithmetic of windows does: also cells far outside of the image, which large dilations step to.
inline bool fits_int(const Axis& a) { return fits_int(a.size + a.padding + a.stride + a.dilation * a.kernel); }
inline bool fits_int(const Window& w) { return fits_int(w.height) && fits_int(w.width); }

// Values on the device: float for the half types, compared as such. narrow rounds; exact is for what widen made.
template <class T>
struct Element {
  using Wide = T;
  static __device__ Wide widen(T v) { return v; }
  static __device__ T narrow(Wide v) { return v; }
  static __device__ T exact(Wide v) { return v; }
};
template <>
struct Element<BFloat16> {
  using Wide = float;
  static __device__ float widen(BFloat16 v) { return Value<BFloat16>::widen(v); }
  static __device__ BFloat16 narrow(float v) { return Value<BFloat16>::narrow(v); }
  static __device__ BFloat16 exact(float v) { return static_cast<BFloat16>(std::bit_cast<uint32_t>(v) >> 16); }
};
template <>
struct Element<Float16> {
  using Wide = float;
#if defined(ADCERT_EMULATION)
  static __device__ float widen(Float16 v) { return Value<Float16>::widen(v); }
  static __device__ Float16 narrow(float v) { return Value<Float16>::narrow(v); }
#else
  static __device__ float widen(Float16 v) { return __half2float(__ushort_as_half(static_cast<uint16_t>(v))); }
  static __device__ Float16 narrow(float v) { return static_cast<Float16>(__half_as_ushort(__float2half_rn(v))); }
#endif
  static __device__ Float16 exact(float v) { return narrow(v); }
};

// max(v, 0) as torch.relu on CUDA: NaN passes, -0.0 does not.
template <class W>
__device__ W positive_part(W v) {
  return !(v <= 0) ? v : W{0};
}

// V neighbours, read and written at once; at most 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
__device__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
__device__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// How many values of T a pack of 16 bytes holds.
template <class T>
constexpr int kPack = static_cast<int>(16 / sizeof(T));

// Whether packs of 16 bytes start at p and again after every `line` values of `bytes` each.
inline bool packs(const void* p, int64_t line, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && line * bytes % 16 == 0;
}

// Lists of int64 that the host made or reads.
inline torch::stable::Device the_cpu() { return torch::stable::Device(torch::headeronly::DeviceType::CPU); }

inline Tensor on_cpu(const Tensor& t) { return t.is_cpu() ? t : torch::stable::to(t, the_cpu()); }

// A list of the host on the device, through pinned memory: nobody waits, and the list may go at once.
inline Tensor sent(const Tensor& list, const torch::stable::Device& device) {
#if defined(ADCERT_EMULATION)
  return torch::stable::to(list, device);
#else
  if (!list.is_cpu()) return torch::stable::to(list, device);
  Tensor pinned = torch::stable::empty(list.sizes(), list.scalar_type(), std::nullopt, the_cpu(), true);
  torch::stable::copy_(pinned, list);
  return torch::stable::to(pinned, device, /*non_blocking=*/true);
#endif
}

inline Tensor long_list(const std::vector<int64_t>& values) {
  Tensor t = torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Long, std::nullopt, the_cpu());
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(t.mutable_data_ptr()));
  return t;
}

}  // namespace adcert

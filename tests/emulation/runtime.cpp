// What a CUDA build of torch has in C++ and a CPU build lacks, for tests: tensors on cuda:0 whose memory is the host's,
// a device guard with streams and events, pinned memory, and the answers torch asks for when it chooses between cuDNN
// and its own kernels. Operators are not here: those of the CUDA key fall back to Python (device.py), which runs them
// on the CPU by means of `host` and `device`, two views of one memory.
//
// A journal tells Python, in order, of everything that bears on who may touch which memory when.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <new>

namespace {

using at::Tensor;
using c10::DataPtr;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::Storage;
using c10::Stream;

const Device kHere(DeviceType::CUDA, 0);
std::atomic<bool> on{false};
std::atomic<bool> cudnn{true};
std::atomic<int64_t> last{0};  // of the numbers given to memory, events and streams
thread_local int64_t current = 0;

// The journal ------------------------------------------------------------------------------------------------

enum Kind : int64_t { kAllocated, kFreed, kRecorded, kBlocked, kUsed };  // timeline.py has the same numbers

struct Journal {
  std::mutex lock;
  std::vector<int64_t> entries;  // kind, what, stream
  void add(Kind kind, int64_t what, int64_t stream) {
    std::lock_guard<std::mutex> held(lock);
    entries.insert(entries.end(), {kind, what, stream});
  }
};

Journal& journal() {
  static auto* made = new Journal;  // tensors may outlive static objects
  return *made;
}

std::vector<int64_t> drain() {
  std::lock_guard<std::mutex> held(journal().lock);
  return std::exchange(journal().entries, {});
}

// Memory -----------------------------------------------------------------------------------------------------

// NaN as float16, bfloat16, float32 and float64, huge, negative and odd as an integer.
void spoil(void* data, size_t bytes) {
  const unsigned char pattern[2] = {0xf1, 0xff};
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(data)[i] = pattern[i % 2];
}

// What a device storage owns: host memory under a number.
struct Memory {
  Storage host;
  int64_t number = ++last;
};

void release(void* context) {
  auto* memory = static_cast<Memory*>(context);
  journal().add(kFreed, memory->number, current);
  delete memory;
}

DataPtr on_device(Storage host) {
  void* data = host.mutable_data();
  auto* memory = new Memory{std::move(host)};
  journal().add(kAllocated, memory->number, current);
  return {data, memory, &release, kHere};
}

struct DeviceAllocator final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(on, "the emulated CUDA device is off: use it inside emulated_cuda()");
    Storage host(Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), false);
    spoil(host.mutable_data(), bytes);
    return on_device(std::move(host));
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

struct PinnedAllocator final : c10::Allocator {
  static std::map<uintptr_t, size_t>& blocks() {
    static auto* made = new std::map<uintptr_t, size_t>;
    return *made;
  }
  static std::mutex& lock() {
    static auto* made = new std::mutex;
    return *made;
  }
  static void free_block(void* data) {
    {
      std::lock_guard<std::mutex> held(lock());
      blocks().erase(reinterpret_cast<uintptr_t>(data));
    }
    std::free(data);
  }
  DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(std::max<size_t>(bytes, 1));
    spoil(data, bytes);
    std::lock_guard<std::mutex> held(lock());
    blocks()[reinterpret_cast<uintptr_t>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &free_block, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> held(lock());
    const auto address = reinterpret_cast<uintptr_t>(data);
    auto after = blocks().upper_bound(address);
    if (after == blocks().begin()) return false;
    --after;
    return address < after->first + after->second;
  }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

// Guard and hooks --------------------------------------------------------------------------------------------

// Used by the autograd engine too: it runs a node on the stream of its forward call and orders streams by events.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kHere; }
  Device getDevice() const override { return kHere; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return Stream(Stream::UNSAFE, kHere, current); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, kHere, 0); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::UNSAFE, kHere, ++last); }
  Stream exchangeStream(Stream stream) const override {
    return Stream(Stream::UNSAFE, kHere, std::exchange(current, stream.id()));
  }
  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new int64_t(++last);
    journal().add(kRecorded, *static_cast<int64_t*>(*event), stream.id());
  }
  void block(void* event, const Stream& stream) const override {
    if (event != nullptr) journal().add(kBlocked, *static_cast<int64_t*>(event), stream.id());
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<int64_t*>(event); }
  void recordDataPtrOnStream(const DataPtr& data, const Stream& stream) const override {
    if (data.get_context() != nullptr)
      journal().add(kUsed, static_cast<Memory*>(data.get_context())->number, stream.id());
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return cudnn; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return kHere; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::holds(data); }
  bool compiledWithCuDNN() const override { return cudnn; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  double batchnormMinEpsilonCuDNN() const override { return 0.0; }
};

// Two views of one memory ------------------------------------------------------------------------------------

Tensor view_of(Storage storage, DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The tensors as the CPU sees them; tensors that share memory share it here too.
std::vector<Tensor> host(at::TensorList tensors) {
  std::vector<Tensor> made;
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_cuda()) {
      made.push_back(tensor);
      continue;
    }
    Storage storage;
    for (size_t j = 0; j < made.size() && !storage; ++j)
      if (tensors[j].storage().is_alias_of(tensor.storage())) storage = made[j].storage();
    if (!storage) {
      auto keep = [](void* context) { delete static_cast<Storage*>(context); };
      DataPtr data(tensor.storage().mutable_data(), new Storage(tensor.storage()), keep, Device(DeviceType::CPU));
      storage = Storage(Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), c10::GetCPUAllocator(),
                        /*resizable=*/true);
    }
    made.push_back(view_of(storage, DispatchKey::CPU, tensor));
  }
  return made;
}

// Results as device tensors: on the memory of `given` where they are views of `seen` = host(given), else on their own.
std::vector<Tensor> device(at::TensorList results, at::TensorList given, at::TensorList seen) {
  std::vector<Tensor> made;
  for (const Tensor& result : results) {
    Storage storage;
    for (size_t j = 0; j < seen.size() && !storage; ++j)
      if (given[j].is_cuda() && seen[j].storage().is_alias_of(result.storage())) storage = given[j].storage();
    for (size_t j = 0; j < made.size() && !storage; ++j)
      if (results[j].storage().is_alias_of(result.storage())) storage = made[j].storage();
    if (!storage)
      storage = Storage(Storage::use_byte_size_t(), result.storage().nbytes(), on_device(result.storage()),
                        &device_allocator, /*resizable=*/true);
    made.push_back(view_of(storage, DispatchKey::CUDA, result));
  }
  return made;
}

// An operator has resized `seen`, the host view of `given`.
void adopt(const Tensor& given, const Tensor& seen) {
  auto* storage = given.storage().unsafeGetStorageImpl();
  if (storage->data() != seen.storage().data()) {
    storage->set_data_ptr_noswap(on_device(seen.storage()));
    storage->set_nbytes(seen.storage().nbytes());
  }
  given.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
}

// Numbers of the tensors' memory; -1 for the CPU's and for no memory.
std::vector<int64_t> memory(at::TensorList tensors) {
  std::vector<int64_t> numbers;
  for (const Tensor& tensor : tensors) {
    void* context = tensor.is_cuda() ? tensor.storage().data_ptr().get_context() : nullptr;
    numbers.push_back(context == nullptr ? -1 : static_cast<Memory*>(context)->number);
  }
  return numbers;
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!where || where->index() <= 0, "CUDA error: invalid device ordinal");
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator,
                                   c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> where, std::optional<bool>) {
  TORCH_CHECK(!where || where->index() <= 0, "CUDA error: invalid device ordinal");
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_allocator, c10::DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

void record_stream(Tensor& tensor, Stream stream) {
  Guard().recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
}

// torch has made its hooks when it was imported, and keeps them: ours, of the same size, take their place.
void enable(bool value, bool with_cudnn) {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  auto* place = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (value) {
    ::new (place) Hooks;
  } else {
    ::new (place) at::CUDAHooksInterface;
  }
  on = value;
  cudnn = with_cudnn;
}

}  // namespace

TORCH_LIBRARY(adcert_device, m) {
  c10::SetAllocator(DeviceType::CUDA, &device_allocator);
  m.def("host(Tensor[] tensors) -> Tensor[]");
  m.def("device(Tensor[] results, Tensor[] given, Tensor[] seen) -> Tensor[]");
  m.def("adopt(Tensor given, Tensor seen) -> ()");
  m.def("memory(Tensor[] tensors) -> int[]");
  m.def("drain() -> int[]", &drain);
  m.def("stream() -> int", [] { return current; });
  m.def("set_stream(int stream) -> ()", [](int64_t stream) { current = stream; });
  m.def("enable(bool value, bool cudnn) -> ()", &enable);
}

TORCH_LIBRARY_IMPL(adcert_device, CompositeExplicitAutograd, m) {
  m.impl("host", &host);
  m.impl("device", &device);
  m.impl("adopt", &adopt);
  m.impl("memory", &memory);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("record_stream", &record_stream);
  m.impl("view", &at::native::view);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_", &at::native::set_cpu_);
}

// A CUDA device that is pretended by the CPU. Tensors claim the device; their memory is the host's. Each operation runs
// the CPU's kernel on aliases of its tensors, after the device checks that CUDA kernels make. What CUDA would launch,
// and what would make the host wait, is reported to Python.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <string>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;

constexpr DeviceIndex NUM_DEVICES = 2;
DeviceIndex current = 0;
PyObject* listener = nullptr;  // called with the kind of an event and the operation

void report(const char* kind, const std::string& operation) {
  if (listener == nullptr) return;
  pybind11::gil_scoped_acquire gil;
  pybind11::handle called(listener);
  called(kind, operation);
}

// Copies to the host that nothing has waited for yet: where they go, and what they hold.
std::vector<std::pair<Tensor, Tensor>> copies_on_their_way;

void wait(const std::string& operation) {
  report("wait", operation);
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto& [host, numbers] : copies_on_their_way) host.copy_(numbers);
  copies_on_their_way.clear();
}

struct Allocator final : at::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = size ? c10::alloc_cpu(size) : nullptr;
    return {memory, memory, raw_deleter(), Device(DeviceType::CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* memory) {
      if (memory) c10::free_cpu(memory);
    };
  }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
Allocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// A storage on another device that shares, and keeps alive, the memory of a storage.
Storage shared_storage(const Storage& source, Device device) {
  auto* owner = new Storage(source);
  c10::DataPtr memory(
      owner->mutable_data(), owner, [](void* owner) { delete static_cast<Storage*>(owner); }, device);
  c10::Allocator* grower = device.is_cuda() ? &allocator : c10::GetCPUAllocator();
  return Storage(Storage::use_byte_size_t(), source.nbytes(), std::move(memory), grower, true);
}

Tensor with_storage(const Tensor& like, Storage storage, DispatchKey key) {
  auto result = at::detail::make_tensor<at::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) result._set_conj(true);
  if (like.is_neg()) result._set_neg(true);
  return result;
}

Storage host_storage(const Tensor& tensor) { return shared_storage(tensor.storage(), Device(DeviceType::CPU)); }

Tensor host_alias(const Tensor& tensor) { return with_storage(tensor, host_storage(tensor), DispatchKey::CPU); }

// The tensors of one operation, and their aliases on the host.
class Operands {
 public:
  explicit Operands(std::string name) : name_(std::move(name)) {}

  // Indices may lie on the host: they are copied first. So may numbers, tensors without dimensions.
  Tensor on_host(const Tensor& tensor, bool is_index) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cpu()) {
      if (is_index)
        waits_ = true;
      else if (tensor.dim() > 0)
        stray_ = true;
      return tensor;
    }
    if (!tensor.is_cuda()) return tensor;
    TORCH_CHECK(!device_ || *device_ == tensor.device(), "Expected all tensors to be on the same device, but found ",
                *device_, " and ", tensor.device(), " in ", name_);
    device_ = tensor.device();
    if (is_index && tensor.scalar_type() == at::kBool) waits_ = true;  // for the number of indices
    Storage storage;
    for (auto& pair : pairs_)
      if (pair.original.storage().is_alias_of(tensor.storage())) storage = pair.alias.storage();
    if (!storage) storage = host_storage(tensor);
    pairs_.push_back({tensor, with_storage(tensor, storage, DispatchKey::CPU), storage.data()});
    return pairs_.back().alias;
  }

  void make_on(Device device) {
    if (!device_) device_ = Device(DeviceType::CUDA, device.has_index() ? device.index() : current);
  }

  void check() const {
    TORCH_CHECK(!(device_ && stray_), "Expected all tensors to be on the same device, but found ", *device_,
                " and cpu in ", name_);
  }

  bool waits() const { return waits_; }

  // An operation may have resized what it was given.
  void take_over_sizes() {
    for (auto& pair : pairs_) {
      const auto& storage = pair.alias.storage();
      if (storage.data() != pair.memory || storage.nbytes() != pair.original.storage().nbytes()) {
        auto grown = shared_storage(storage, pair.original.device());
        auto* impl = pair.original.storage().unsafeGetStorageImpl();
        impl->set_data_ptr_noswap(std::move(grown.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
        impl->set_nbytes(storage.nbytes());
      }
      if (pair.alias.sizes() != pair.original.sizes() || pair.alias.strides() != pair.original.strides())
        pair.original.unsafeGetTensorImpl()->set_sizes_and_strides(
            pair.alias.sizes(), pair.alias.strides(), pair.alias.storage_offset());
    }
  }

  Tensor on_device(const Tensor& result) const {
    if (!result.defined() || !result.is_cpu()) return result;
    for (auto& pair : pairs_)
      if (pair.alias.is_same(result)) return pair.original;
    for (auto& pair : pairs_)
      if (pair.alias.storage().is_alias_of(result.storage()))
        return with_storage(result, pair.original.storage(), DispatchKey::CUDA);
    auto device = device_.value_or(Device(DeviceType::CUDA, current));
    return with_storage(result, shared_storage(result.storage(), device), DispatchKey::CUDA);
  }

 private:
  struct Pair {
    Tensor original, alias;
    const void* memory;
  };
  std::string name_;
  std::vector<Pair> pairs_;
  std::optional<Device> device_;
  bool stray_ = false, waits_ = false;
};

// Replace the tensors of an argument or a result.
template <typename Replace>
void replace_tensors(IValue& value, Replace replace) {
  if (value.isTensor()) {
    value = replace(value.toTensor(), false);
  } else if (value.isTensorList()) {
    auto list = value.toTensorList();
    c10::List<Tensor> replaced;
    for (size_t i = 0; i < list.size(); ++i) replaced.push_back(replace(list.get(i), false));
    value = replaced;
  } else if (value.isOptionalTensorList()) {
    auto list = value.toOptionalTensorList();
    c10::List<std::optional<Tensor>> replaced;
    for (size_t i = 0; i < list.size(); ++i) {
      std::optional<Tensor> each = list.get(i);
      replaced.push_back(each ? std::make_optional(replace(*each, true)) : each);
    }
    value = replaced;
  }
}

const std::unordered_set<std::string> SIZED_BY_VALUES = {
    "aten::nonzero",     "aten::masked_select", "aten::_unique2",           "aten::_unique",     "aten::unique_dim",
    "aten::bincount",    "aten::equal",         "aten::unique_consecutive", "aten::multinomial", "aten::is_nonzero",
    "aten::repeat_interleave"};

void run_on_host(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  Operands operands(name);
  const size_t num_arguments = schema.arguments().size();
  for (size_t i = stack->size() - num_arguments; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      operands.make_on(value.toDevice());
      value = Device(DeviceType::CPU);
    } else {
      replace_tensors(value, [&](const Tensor& each, bool is_index) { return operands.on_host(each, is_index); });
    }
  }
  operands.check();
  report("launch", name);
  if (operands.waits() || SIZED_BY_VALUES.count(name)) wait(name);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  operands.take_over_sizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    replace_tensors((*stack)[i], [&](const Tensor& each, bool) { return operands.on_device(each); });
}

using Dtype = std::optional<c10::ScalarType>;

struct Current {  // the allocator allocates on the current device
  DeviceIndex before = current;
  explicit Current(std::optional<Device> device) {
    if (device && device->has_index()) current = device->index();
  }
  ~Current() { current = before; }
};

Tensor empty(at::IntArrayRef size, Dtype dtype, std::optional<c10::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  Current here(device);
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, std::optional<c10::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  Current here(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

// A copy from the host waits unless it is asked not to; pageable memory is staged before the call returns. A copy into
// the host's pageable memory always waits.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.numel() == 0) return self;
  const bool from_host = source.is_cpu(), to_host = self.is_cpu();
  report("launch", "aten::copy_");
  if (to_host || (from_host && !non_blocking)) wait(to_host ? "copy to host" : "copy from host");
  auto to = self.is_cuda() ? host_alias(self) : self, from = source.is_cuda() ? host_alias(source) : source;
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from);
  return self;
}

// A copy into new memory of the host, which torch pins if the copy is not to wait: it holds nothing until a wait.
Tensor to_copy(const Tensor& self, Dtype dtype, std::optional<c10::Layout> layout, std::optional<Device> device,
               std::optional<bool> pin_memory, bool non_blocking, std::optional<c10::MemoryFormat> format) {
  if (!(non_blocking && device && device->is_cpu()))
    return at::native::_to_copy(self, dtype, layout, device, pin_memory, non_blocking, format);
  report("launch", "aten::copy_");
  at::AutoDispatchBelowADInplaceOrView below;
  auto numbers = host_alias(self).to(dtype.value_or(self.scalar_type()), false, true);
  copies_on_their_way.emplace_back(at::full_like(numbers, 7), numbers);
  return copies_on_their_way.back().first;
}

c10::Scalar read_number(const Tensor& self) {
  wait("item");
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_local_scalar_dense(host_alias(self));
}

Tensor& set_storage(Tensor& self, Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.empty() && !size.empty())
    impl->set_sizes_contiguous(size);
  else
    impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, Storage storage) {
  const int64_t length = storage.nbytes() / self.dtype().itemsize();
  return set_storage(self, std::move(storage), 0, {length}, {});
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("_to_copy", &to_copy);
  library.impl("_local_scalar_dense", &read_number);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  // Views launch nothing.
  library.impl("as_strided", &as_strided);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  // One kernel on a real device, several where it is composed of others.
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  library.impl("scaled_dot_product_attention", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  module.attr("NUM_DEVICES") = static_cast<int>(NUM_DEVICES);
  module.def("listen", [](pybind11::object called) {
    Py_XDECREF(listener);
    listener = called.is_none() ? nullptr : called.release().ptr();
  });
  module.def("current_device", [] { return static_cast<int>(current); });
  module.def("set_device", [](int index) { current = static_cast<DeviceIndex>(index); });
}

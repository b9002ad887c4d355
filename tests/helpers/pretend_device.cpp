// A device that stands in for a GPU: its tensors lie in main memory and are computed by the CPU's kernels, but operations
// refuse tensors of two devices, as those of CUDA do.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <unordered_map>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// ---- memory, streams, generators

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;
  explicit Generator(at::Generator cpu) : GeneratorImpl(DEVICE, KEYS), cpu(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(cpu.clone()); }
};

at::Generator new_generator() { return at::make_generator<Generator>(at::detail::createCPUGenerator()); }
// Not the CPU's: what forgets to name the device's own draws is found by comparing.
at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// ---- tensors of this device seen as tensors of the CPU, over the same memory

struct Borrowed {
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;         // ours -> as the CPU's
  std::unordered_map<void*, c10::Storage> by_memory;                    // memory -> ours
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;               // ours, as the CPU's

  at::Tensor cpu(const at::Tensor& ours) {
    for (const auto& [known, alias] : tensors)
      if (known.is_same(ours)) return alias;
    const c10::Storage& storage = ours.storage();
    auto found = storages.find(storage.unsafeGetStorageImpl());
    if (found == storages.end()) {
      void* data = storage.mutable_data();
      c10::Storage lent(c10::Storage::use_byte_size_t(), storage.nbytes(),
                        c10::DataPtr(data, data, [](void*) {}, c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU), true);
      found = storages.emplace(storage.unsafeGetStorageImpl(), std::move(lent)).first;
      if (data) by_memory.emplace(data, storage);
    }
    at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), ours.dtype());
    auto* impl = alias.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    if (ours.is_conj()) alias._set_conj(true);
    if (ours.is_neg()) alias._set_neg(true);
    if (ours.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    tensors.emplace_back(ours, alias);
    return alias;
  }

  at::Tensor own(const at::Tensor& cpu) {
    if (!cpu.defined() || !cpu.device().is_cpu()) return cpu;
    for (const auto& [ours, alias] : tensors)
      if (alias.is_same(cpu)) return ours;
    void* data = cpu.storage().mutable_data();
    auto lent = data ? by_memory.find(data) : by_memory.end();
    c10::Storage storage = lent != by_memory.end()
        ? lent->second
        : c10::Storage(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(),
                       c10::DataPtr(data, new at::Tensor(cpu), [](void* kept) { delete static_cast<at::Tensor*>(kept); }, DEVICE),
                       &memory, true);
    at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), KEYS, cpu.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    if (cpu.is_conj()) result._set_conj(true);
    if (cpu.is_neg()) result._set_neg(true);
    return result;
  }

  // An operation gave what it was to write to another size, and so other memory.
  void write_back() {
    for (auto& [ours, alias] : tensors) {
      const bool moved = alias.storage().mutable_data() != ours.storage().mutable_data();
      if (!moved && alias.sizes() == ours.sizes() && alias.strides() == ours.strides()) continue;
      at::native::resize_(ours, alias.sizes());
      ours.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), ours.storage_offset());
      if (alias.numel() && moved) std::memcpy(ours.storage().mutable_data(), alias.storage().data(), alias.storage().nbytes());
    }
  }
};

// ---- every operation

bool ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == TYPE; }

// As on CUDA: indices may be the CPU's, and so may numbers in tensors, and either side of a copy.
bool takes_cpu(const std::string& name, size_t argument) {
  return (argument == 1 && (name == "aten::index" || name == "aten::index_put_" || name == "aten::index_put" ||
                            name == "aten::_index_put_impl_" || name == "aten::_unsafe_index")) ||
      name == "aten::_foreach_copy_";
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = op.operator_name().name;
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  Borrowed borrowed;
  bool any_ours = false, any_cpu = false;
  auto take = [&](const at::Tensor& tensor, size_t argument) {
    if (!tensor.defined()) return tensor;
    if (ours(tensor)) {
      any_ours = true;
      return borrowed.cpu(tensor);
    }
    any_cpu = any_cpu || (tensor.device().is_cpu() && tensor.dim() > 0 && !takes_cpu(name, argument));
    return tensor;
  };
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[begin + i];
    if (value.isTensor()) {
      value = take(value.toTensor(), i);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> taken;
      for (const at::Tensor& tensor : value.toTensorVector()) taken.push_back(take(tensor, i));
      value = c10::IValue(taken);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> taken;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        taken.push_back(tensor.has_value() ? std::optional<at::Tensor>(take(*tensor, i)) : std::nullopt);
      value = c10::IValue(taken);
    } else if (value.isDevice() && value.toDevice().type() == TYPE) {
      value = c10::IValue(c10::Device(c10::kCPU));
      any_ours = true;
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == TYPE, "Expected a 'pretend' device type for generator but found '",
                  generator.device().type(), "'");
      value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      value = static_cast<Generator*>(default_generator().unsafeGetGeneratorImpl())->cpu;
    }
  }
  TORCH_CHECK(!(any_ours && any_cpu), "Expected all tensors to be on the same device, but found at least two devices, "
              "pretend:0 and cpu! (", name, ")");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  borrowed.write_back();
  const size_t returned = schema.returns().size(), first = stack->size() - returned;
  for (size_t i = 0; i < returned; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = borrowed.own(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> owned;
      for (const at::Tensor& tensor : value.toTensorVector()) owned.push_back(borrowed.own(tensor));
      value = c10::IValue(owned);
    }
  }
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Borrowed borrowed;
  auto cpu = [&](const at::Tensor& tensor) { return ours(tensor) ? borrowed.cpu(tensor) : tensor; };
  cpu(to).copy_(cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

// Convolutions of a device that is not torch's own.
at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
  Borrowed borrowed;
  auto cpu = [&](const at::Tensor& tensor) { return tensor.defined() ? borrowed.cpu(tensor) : tensor; };
  return borrowed.own(at::convolution(cpu(input), cpu(weight), cpu(bias.value_or(at::Tensor())), stride, padding, dilation,
                                      transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  Borrowed borrowed;
  const int64_t outputs = gradient.size(1);
  auto [a, b, c] = at::convolution_backward(borrowed.cpu(gradient), borrowed.cpu(input), borrowed.cpu(weight),
                                            c10::IntArrayRef(outputs), stride, padding, dilation, transposed, output_padding,
                                            groups, wanted);
  return {borrowed.own(a), borrowed.own(b), borrowed.own(c)};
}

// The fused kernels for attention are another device's.
int64_t no_fused_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                           double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", [](const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                          std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  m.impl("view", [](const at::Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); });
  m.impl("_reshape_alias", [](const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  m.impl("resize_", [](const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) -> const at::Tensor& {
    return at::native::resize_(self, size, format);
  });
  m.impl("set_.source_Storage_storage_offset", [](at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                                                  c10::IntArrayRef stride) -> at::Tensor& {
    return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
  });
  m.impl("set_.source_Storage", [](at::Tensor& self, at::Storage source) -> at::Tensor& {
    return at::native::set_(self, std::move(source));
  });
  m.impl("set_.source_Tensor", [](at::Tensor& self, const at::Tensor& source) -> at::Tensor& {
    return at::native::set_tensor_(self, source);
  });
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_fused_sdp_choice", &no_fused_attention);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY(pretend, m) {
  m.def("seed(int seed) -> ()", [](int64_t seed) { default_generator().set_current_seed(seed); });
  m.def("state() -> Tensor", [] { return at::Tensor(default_generator().unsafeGetGeneratorImpl()->get_state()); });
  m.def("set_state(Tensor state) -> ()", [](const at::Tensor& state) {
    default_generator().unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
  });
}

}  // namespace

static const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// SPDX-License-Identifier: Apache-2.0
// A device of torch's whose memory the processor cannot touch, and whose kernels are the CPU's on copies.
//
// It stands for an accelerator where there is none: what reads or writes its memory without copying it to the host ends
// the process, since its pages are closed but for the moment of a copy.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

namespace {

constexpr auto kApart = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kApart, 0);

using Block = std::pair<void*, size_t>;

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  munmap(block->first, block->second);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    bytes = std::max<size_t>(bytes, 1);
    void* start = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "no memory apart for ", bytes, " bytes");
    return {start, new Block(start, bytes), &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, std::size_t) const override { TORCH_CHECK(false, "memory apart is not copied raw"); }
};

Memory memory;

// What the processor sees of a tensor, as long as this lives.
class Opened {
 public:
  explicit Opened(const at::Tensor& tensor) : seen_(tensor) {
    if (tensor.device().type() != kApart) return;
    const auto& storage = tensor.storage();
    start_ = storage.data_ptr().get();
    bytes_ = std::max<size_t>(storage.nbytes(), 1);
    TORCH_CHECK(mprotect(start_, bytes_, PROT_READ | PROT_WRITE) == 0, "memory apart cannot be opened");
    auto* first = static_cast<char*>(start_) + tensor.storage_offset() * tensor.itemsize();
    seen_ = at::from_blob(first, tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
  }
  ~Opened() {
    if (start_ != nullptr) mprotect(start_, bytes_, PROT_NONE);
  }
  Opened(const Opened&) = delete;
  const at::Tensor& seen() const { return seen_; }

 private:
  at::Tensor seen_;
  void* start_ = nullptr;
  size_t bytes_ = 0;
};

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// What was there is lost where it grows, as out= of the CPU's kernels writes all of it.
const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto storage = self.storage();
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  if (storage.nbytes() < bytes) {
    storage.set_data_ptr_noswap(memory.allocate(bytes));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  const Opened source(self), target(to);
  target.seen().copy_(source.seen());
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

std::optional<at::Tensor> on_host(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? std::optional(tensor->cpu()) : tensor;
}

// Its schema does not say that it writes the statistics, so the fallback would not bring them back.
std::tuple<at::Tensor, at::Tensor, at::Tensor> native_batch_norm(
    const at::Tensor& input, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance, bool training, double momentum,
    double eps) {
  const auto host_mean = on_host(mean), host_variance = on_host(variance);
  auto [output, saved_mean, saved_scale] = at::native_batch_norm(
      input.cpu(), on_host(weight), on_host(bias), host_mean, host_variance, training, momentum, eps);
  if (training && mean.has_value() && mean->defined()) mean->copy_(*host_mean);
  if (training && variance.has_value() && variance->defined()) variance->copy_(*host_variance);
  return {output.to(kDevice), saved_mean.to(kDevice), saved_scale.to(kDevice)};
}

bool has_compatible_shallow_copy_type(const at::Tensor&, const at::Tensor&) { return true; }

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kApart> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace

namespace at {
REGISTER_ALLOCATOR(kApart, &memory);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}  // namespace at

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("native_batch_norm", TORCH_FN(native_batch_norm));
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_shallow_copy_type));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

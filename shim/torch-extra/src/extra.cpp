// Functions of libtorch that tch does not bind. A tch tensor is an at::Tensor*; no exception leaves this file.
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>

#include <cstdio>
#include <exception>
#include <optional>

namespace {
template <typename Call>
int guarded(char* message, size_t room, Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  } catch (...) {
    std::snprintf(message, room, "an exception of an unknown kind");
    return 1;
  }
}

std::optional<at::Tensor> optional(at::Tensor* tensor) {
  return tensor ? std::optional<at::Tensor>(*tensor) : std::nullopt;
}
} // namespace

extern "C" {
int torch_extra_fused_adamw(at::Tensor* values, at::Tensor* gradient, at::Tensor* first, at::Tensor* second,
                            at::Tensor* step, double learning_rate, double beta1, double beta2, double weight_decay,
                            double epsilon, at::Tensor* gradient_scale, at::Tensor* found_inf, char* message,
                            size_t room) {
  return guarded(message, room, [&] {
    at::_fused_adamw_({*values}, {*gradient}, {*first}, {*second}, {}, {*step}, learning_rate, beta1, beta2,
                      weight_decay, epsilon, /*amsgrad=*/false, /*maximize=*/false, optional(gradient_scale),
                      optional(found_inf));
  });
}

// A contiguous copy on CUDA device `index` through page-locked memory, not waited for; null where it fails.
at::Tensor* torch_extra_to_cuda(at::Tensor* tensor, int index, char* message, size_t room) {
  at::Tensor* copy = nullptr;
  guarded(message, room, [&] {
    // Without the device, which tch must name: libtorch warns of it at every call.
    const auto device = c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
    copy = new at::Tensor(tensor->contiguous().pin_memory().to(tensor->options().device(device), /*non_blocking=*/true));
  });
  return copy;
}

// Peak bytes of device `index` in this process: allocated to tensors, and reserved from the driver.
int torch_extra_device_peaks(int index, int64_t* peaks, char* message, size_t room) {
  return guarded(message, room, [&] {
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(index));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    peaks[0] = stats.allocated_bytes[all].peak;
    peaks[1] = stats.reserved_bytes[all].peak;
  });
}
}

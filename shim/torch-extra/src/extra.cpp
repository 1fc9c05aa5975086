// Functions of libtorch that tch does not bind. A tch tensor is an at::Tensor*; no exception leaves this file.
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

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

// A linear map or a convolution whose frozen weight rests in another number format than it computes in: the weight is converted
// anew for each pass, so that the graph keeps no copy of it.
struct Rested : torch::autograd::Function<Rested> {
  // Stride and padding of a convolution; a linear map has a stride of 0.
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, int64_t stride, int64_t padding) {
    context->save_for_backward({weight});
    context->saved_data["stride"] = stride;
    context->saved_data["padding"] = padding;
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["shape"] = x.sizes().vec();
    const auto converted = weight.to(x.scalar_type());
    return stride ? at::conv2d(x, converted, bias, stride, padding) : at::linear(x, converted, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto& gradient = gradients[0];
    const auto stride = context->saved_data["stride"].toInt();
    at::Tensor of_x, of_bias;
    if (context->needs_input_grad(0)) {
      const auto weight = context->get_saved_variables()[0].to(gradient.scalar_type());
      if (stride) {
        const auto padding = context->saved_data["padding"].toInt();
        // Only its shape counts, and memory that nobody touches is none.
        const auto x = at::empty(context->saved_data["shape"].toIntVector(), gradient.options());
        of_x = std::get<0>(at::convolution_backward(gradient, x, weight, std::nullopt, {stride, stride}, {padding, padding},
                                                    {1, 1}, false, {0, 0}, 1, {true, false, false}));
      } else {
        of_x = gradient.matmul(weight);
      }
    }
    // Inputs that are no tensors are not counted.
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2)) {
      std::vector<int64_t> summed;
      for (int64_t dimension = 0; dimension < gradient.dim(); ++dimension) {
        if (dimension != (stride ? 1 : gradient.dim() - 1)) summed.push_back(dimension);
      }
      of_bias = summed.empty() ? gradient : gradient.sum(summed);
    }
    return {of_x, at::Tensor(), of_bias, at::Tensor(), at::Tensor()};
  }
};
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

// The output of `Rested`; null where it fails.
at::Tensor* torch_extra_rested(at::Tensor* x, at::Tensor* weight, at::Tensor* bias, int64_t stride, int64_t padding,
                               char* message, size_t room) {
  at::Tensor* output = nullptr;
  guarded(message, room, [&] { output = new at::Tensor(Rested::apply(*x, *weight, optional(bias), stride, padding)); });
  return output;
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

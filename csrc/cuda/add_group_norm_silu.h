// The strict ops that add and normalise, and that recompute the output, which only this backend has kernels for.
#pragma once

#include "cuda/backend.h"

namespace ddpm_fast {

#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wmissing-field-initializers"

struct AddingOps : Ops<Cuda> {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> add_group_norm_silu(const Tensor& x, const MaybeTensor& input_bias,
      const MaybeTensor& residual, const MaybeTensor& skip, const Tensor& weight, const Tensor& bias,
      const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, double eps, bool silu, bool keep) {
    const char* op = "add_group_norm_silu";
    const Inputs inputs(op, "x", x, 2);
    const ScalarType type = x.scalar_type();
    inputs.check_data("residual", residual, {type});
    inputs.check_more_channels("skip", skip);
    const int64_t channels = x.size(1) + (skip ? skip->size(1) : 0);
    check_parameters(op, inputs, x, channels, weight, bias, scale, shift, groups);
    const int64_t stride = check_input_bias(op, input_bias, x, x.size(1));
    STD_TORCH_CHECK(keep || !(residual || skip), op, ": h must be kept where there is a residual or a skip");
    Shape shape = channels_last(op, inputs, x);
    shape.channels = channels;
    const Guard guard(x);
    Tensor y = inputs.like_first(channels), h = keep ? inputs.like_first(channels) : inputs.array(type, {0});
    auto [mean, rstd] = new_statistics(inputs, groups, y.numel() == 0);
    if (y.numel() == 0) return {y, h, mean, rstd};
    run_with_workspace(inputs,
        AddGroupNormSilu{
            .x = data_of(x),
            .input_bias = data_of(input_bias),
            .residual = data_of(residual),
            .skip = data_of(skip),
            .weight = data_of(weight),
            .bias = data_of(bias),
            .scale = data_of(scale),
            .shift = data_of(shift),
            .y = y.mutable_data_ptr(),
            .h = data_if(keep, h),
            .mean = result_of(mean),
            .rstd = result_of(rstd),
            .shape = shape,
            .channels = x.size(1),
            .input_bias_stride = stride,
            .groups = groups,
            .eps = static_cast<float>(eps),
            .silu = silu,
            .x_type = type_of(type),
            .parameter_type = type_of(weight.scalar_type()),
            .input_bias_type = type_of(input_bias ? input_bias->scalar_type() : type),
            .workspace = nullptr,
        });
    return {y, h, mean, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_group_norm_silu_backward(
      const Tensor& grad, const MaybeTensor& grad_sum, const Tensor& x, const MaybeTensor& input_bias,
      const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias, const MaybeTensor& scale,
      const MaybeTensor& shift, int64_t groups, bool silu, bool kept, int64_t channels) {
    const char* op = "add_group_norm_silu_backward";
    const Inputs inputs(op, "x", x, 2);
    const ScalarType type = x.scalar_type();
    inputs.check_data("grad", grad, {type});
    inputs.check_data("grad_sum", grad_sum, {type});
    check_parameters(op, inputs, x, x.size(1), weight, bias, scale, shift, groups);
    STD_TORCH_CHECK(0 <= channels && channels <= x.size(1) && (kept || channels == x.size(1)), op, ": ", channels,
        " channels do not go with ", describe(x));
    const int64_t stride = check_input_bias(op, input_bias, x, channels);
    const Shape shape = channels_last(op, inputs, x);
    check_statistics(inputs, mean, rstd, groups);
    const Guard guard(x);
    Tensor grad_x = inputs.like_first(channels), grad_skip = inputs.like_first(shape.channels - channels);
    auto [grad_weight, grad_bias, grad_scale, grad_shift] = new_gradients(inputs, type, weight, scale);
    Tensor grad_input_bias = !input_bias ? inputs.array(type, {0})
        : input_bias->dim() == 1         ? inputs.array(input_bias->scalar_type(), {channels})
                                         : inputs.array(input_bias->scalar_type(), {shape.samples, channels});
    if (shape.samples == 0 || shape.plane == 0) torch::stable::zero_(grad_input_bias);
    if (shape.channels > 0) {
      run_with_workspace(inputs,
          AddGroupNormSiluBackward{
              .grad = data_of(grad),
              .grad_sum = data_of(grad_sum),
              .x = data_of(x),
              .input_bias = data_of(input_bias),
              .mean = floats_of(mean),
              .rstd = floats_of(rstd),
              .weight = data_of(weight),
              .bias = data_of(bias),
              .scale = data_of(scale),
              .shift = data_of(shift),
              .grad_x = grad_x.mutable_data_ptr(),
              .grad_skip = data_if(channels < shape.channels, grad_skip),
              .grad_input_bias = data_if(input_bias.has_value(), grad_input_bias),
              .grad_weight = grad_weight.mutable_data_ptr(),
              .grad_bias = grad_bias.mutable_data_ptr(),
              .grad_scale = data_if(scale.has_value(), grad_scale),
              .grad_shift = data_if(scale.has_value(), grad_shift),
              .shape = shape,
              .channels = channels,
              .input_bias_stride = stride,
              .groups = groups,
              .silu = silu,
              .kept = kept,
              .x_type = type_of(type),
              .parameter_type = type_of(weight.scalar_type()),
              .input_bias_type = type_of(input_bias ? input_bias->scalar_type() : type),
              .workspace = nullptr,
          });
    }
    return {grad_x, grad_skip, grad_input_bias, grad_weight, grad_bias, grad_scale, grad_shift};
  }

  static Tensor recompute_group_norm_silu(const Tensor& x, const MaybeTensor& input_bias, const Tensor& mean,
      const Tensor& rstd, const Tensor& weight, const Tensor& bias, int64_t groups, bool silu) {
    const char* op = "recompute_group_norm_silu";
    const Inputs inputs(op, "x", x, 2);
    const ScalarType type = x.scalar_type();
    check_parameters(op, inputs, x, x.size(1), weight, bias, std::nullopt, std::nullopt, groups);
    const int64_t stride = check_input_bias(op, input_bias, x, x.size(1));
    const Shape shape = channels_last(op, inputs, x);
    check_statistics(inputs, mean, rstd, groups);
    const Guard guard(x);
    Tensor y = inputs.like_first(type);
    if (y.numel() == 0) return y;
    Cuda::run(RecomputeGroupNormSilu{
        .x = data_of(x),
        .input_bias = data_of(input_bias),
        .mean = floats_of(mean),
        .rstd = floats_of(rstd),
        .weight = data_of(weight),
        .bias = data_of(bias),
        .y = y.mutable_data_ptr(),
        .shape = shape,
        .input_bias_stride = stride,
        .groups = groups,
        .silu = silu,
        .x_type = type_of(type),
        .parameter_type = type_of(weight.scalar_type()),
        .input_bias_type = type_of(input_bias ? input_bias->scalar_type() : type),
    });
    return y;
  }

  static void register_all(torch::stable::detail::StableLibrary& library) {
    library.impl("add_group_norm_silu", TORCH_BOX(&AddingOps::add_group_norm_silu));
    library.impl("add_group_norm_silu_backward", TORCH_BOX(&AddingOps::add_group_norm_silu_backward));
    library.impl("recompute_group_norm_silu", TORCH_BOX(&AddingOps::recompute_group_norm_silu));
  }

 private:
  static Shape channels_last(const char* op, const Inputs& inputs, const Tensor& x) {
    const Shape shape = inputs.of_channels();
    STD_TORCH_CHECK(!shape.planar, op, ": x is to be channels-last, got ", describe(x));
    return shape;
  }

  // Returns the distance of a sample's row from the next one; 0 where all samples have the same.
  static int64_t check_input_bias(const char* op, const MaybeTensor& bias, const Tensor& x, int64_t channels) {
    if (!bias) return 0;
    const int64_t dims = bias->dim();
    const ScalarType type = bias->scalar_type();
    const bool fits = (dims == 1 || (dims == 2 && bias->size(0) == x.size(0))) && bias->size(dims - 1) == channels &&
        (channels == 1 || bias->stride(dims - 1) == 1) && (type == ScalarType::Float || type == x.scalar_type()) &&
        bias->device() == x.device();
    STD_TORCH_CHECK(fits, op, ": input_bias ", describe(*bias), " does not go with ", describe(x));
    if (dims == 1) return 0;
    if (bias->size(0) <= 1) return channels;
    STD_TORCH_CHECK(bias->stride(0) >= channels, op, ": rows of input_bias ", describe(*bias), " overlap");
    return bias->stride(0);
  }
};

#pragma GCC diagnostic pop

}  // namespace ddpm_fast

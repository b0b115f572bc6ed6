// The strict ops on PyTorch tensors, for any backend. Each one checks its inputs, allocates its results, fills in the
// argument struct of its kernel and runs it.
//
// A backend is a type that has
// - `run(const QSample&)`, and likewise for every other struct of arguments.h;
// - `workspace_size(const WeightedLoss&)`, and likewise for every struct with a `workspace`: the number of floats that
//   the kernel needs there;
// - `Guard`, which is constructed from a tensor and destroyed when the call ends. CUDA's makes the tensor's device the
//   current one.
#pragma once

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "common/inputs.h"

namespace ddpm_fast {

using MaybeTensor = std::optional<Tensor>;

inline const void* data_of(const Tensor& x) { return x.const_data_ptr(); }
inline const void* data_of(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }
inline const int64_t* integers_of(const Tensor& x) { return x.const_data_ptr<int64_t>(); }
inline const int64_t* integers_of(const MaybeTensor& x) { return x ? integers_of(*x) : nullptr; }
inline const float* floats_of(const Tensor& x) { return x.const_data_ptr<float>(); }
inline const float* floats_of(const MaybeTensor& x) { return x ? floats_of(*x) : nullptr; }
inline void* target_of(const Tensor& x) { return x.mutable_data_ptr(); }
inline void* target_of(const MaybeTensor& x) { return x ? x->mutable_data_ptr() : nullptr; }
inline float* result_of(Tensor& x) { return x.mutable_data_ptr<float>(); }
// A result that was not requested is an empty tensor, for which the kernel receives a null pointer.
inline void* data_if(bool wanted, Tensor& x) { return wanted ? x.mutable_data_ptr() : nullptr; }

// Argument structs are filled in by the names of their fields. A field that is left out is an error, for it would be
// null or 0.
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wmissing-field-initializers"

template <class Backend>
struct Ops {
  using Guard = typename Backend::Guard;

  static Tensor fold_in(const Tensor& keys, const Tensor& data) {
    const Inputs inputs("fold_in", "data", data);
    inputs.check_array("data", data, ScalarType::Long, {-1});
    inputs.check_array("keys", keys, ScalarType::Long, {data.size(0), 2});
    const Guard guard(keys);
    Tensor out = inputs.array(ScalarType::Long, {data.size(0), 2});
    if (out.numel() == 0) return out;
    Backend::run(FoldIn{
        .keys = integers_of(keys),
        .data = integers_of(data),
        .out = out.mutable_data_ptr<int64_t>(),
        .count = data.size(0),
    });
    return out;
  }

  static Tensor normal(const Tensor& keys, int64_t size) {
    const Inputs inputs("normal", "keys", keys);
    inputs.check_array("keys", keys, ScalarType::Long, {-1, 2});
    STD_TORCH_CHECK(size >= 0, "normal: size is ", size);
    const Guard guard(keys);
    Tensor out = inputs.array(ScalarType::Float, {keys.size(0), size});
    if (out.numel() == 0) return out;
    Backend::run(Normal{
        .keys = integers_of(keys),
        .out = result_of(out),
        .count = keys.size(0),
        .size = size,
    });
    return out;
  }

  static Tensor q_sample(const Tensor& x_start, const MaybeTensor& noise, const MaybeTensor& keys, const Tensor& t,
      const Tensor& rows, ScalarType dtype) {
    const Inputs inputs("q_sample", "x_start", x_start);
    const bool bytes = x_start.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(is_any_of(dtype, floats), "q_sample: dtype is ", dtype);
    inputs.check_data("x_start", x_start, {dtype, ScalarType::Float, ScalarType::Byte});
    inputs.check_data("noise", noise, {bytes ? ScalarType::Float : x_start.scalar_type()});
    inputs.check_array("keys", keys, ScalarType::Long, {inputs.samples(), 2});
    inputs.check_array("t", t, ScalarType::Long, {inputs.samples()});
    inputs.check_array("rows", rows, ScalarType::Float, {-1, 2});
    inputs.check_index("t", t, rows.size(0));
    STD_TORCH_CHECK(noise.has_value() != keys.has_value(), "q_sample: give either noise or keys");
    const Guard guard(x_start);
    Tensor out = inputs.like_first(dtype);
    if (out.numel() == 0) return out;
    Backend::run(QSample{
        .x_start = data_of(x_start),
        .noise = data_of(noise),
        .keys = integers_of(keys),
        .t = integers_of(t),
        .rows = floats_of(rows),
        .out = out.mutable_data_ptr(),
        .shape = inputs.shape(),
        .timesteps = rows.size(0),
        .x_type = type_of(x_start.scalar_type()),
        .out_type = type_of(dtype),
    });
    return out;
  }

  static std::tuple<Tensor, Tensor> weighted_loss(const Tensor& pred, const MaybeTensor& x_start,
      const MaybeTensor& noise, const MaybeTensor& keys, const Tensor& t, const Tensor& rows,
      const MaybeTensor& upstream, int64_t loss_type, double scale, bool with_grad) {
    const Inputs inputs("weighted_loss", "pred", pred);
    inputs.check_data("pred", pred, floats);
    const ScalarType type = pred.scalar_type();
    const bool bytes = x_start && x_start->scalar_type() == ScalarType::Byte;
    ScalarType data = type;
    if (x_start && !bytes) {
      data = x_start->scalar_type();
    } else if (noise) {
      data = noise->scalar_type();
    } else if (bytes) {
      data = ScalarType::Float;
    }
    STD_TORCH_CHECK(data == ScalarType::Float || (data == type && !bytes), "weighted_loss: data in ", data,
        " do not go with pred ", describe(pred));
    inputs.check_data("x_start", x_start, {bytes ? ScalarType::Byte : data});
    inputs.check_data("noise", noise, {data});
    inputs.check_array("keys", keys, ScalarType::Long, {inputs.samples(), 2});
    inputs.check_array("t", t, ScalarType::Long, {inputs.samples()});
    inputs.check_array("rows", rows, ScalarType::Float, {-1, 3});
    inputs.check_array("upstream", upstream, ScalarType::Float, {inputs.samples()});
    inputs.check_index("t", t, rows.size(0));
    STD_TORCH_CHECK(x_start || noise || keys, "weighted_loss: there is no target");
    STD_TORCH_CHECK(!(noise && keys), "weighted_loss: give either noise or keys");
    STD_TORCH_CHECK(0 <= loss_type && loss_type < 3, "weighted_loss: loss_type is ", loss_type);
    const Guard guard(pred);
    Tensor loss = inputs.array(ScalarType::Float, {inputs.samples()});
    Tensor grad = with_grad ? inputs.like_first(type) : inputs.array(type, {0});
    if (pred.numel() == 0) return {torch::stable::zero_(loss), grad};
    run_with_workspace(inputs,
        WeightedLoss{
            .pred = data_of(pred),
            .x_start = data_of(x_start),
            .noise = data_of(noise),
            .keys = integers_of(keys),
            .t = integers_of(t),
            .rows = floats_of(rows),
            .upstream = floats_of(upstream),
            .loss = result_of(loss),
            .grad = data_if(with_grad, grad),
            .shape = inputs.shape(),
            .timesteps = rows.size(0),
            .scale = static_cast<float>(scale),
            .loss_type = static_cast<LossType>(loss_type),
            .pred_type = type_of(type),
            .data_type = type_of(data),
            .x_is_bytes = bytes,
            .workspace = nullptr,
        });
    return {loss, grad};
  }

  static void reverse_step(const Tensor& x, const Tensor& pred, const MaybeTensor& noise, const MaybeTensor& keys,
      const MaybeTensor& x_start_prev, const MaybeTensor& variance, const MaybeTensor& bounds, const Tensor& step,
      const Tensor& rows, double low, double high, const Tensor& x_next, const MaybeTensor& x_start,
      const MaybeTensor& model_input) {
    const Inputs inputs("reverse_step", "x", x);
    const ScalarType type = x.scalar_type(), pred_type = pred.scalar_type();
    inputs.check_data("x", x, floats);
    inputs.check_data("pred", pred, floats);
    STD_TORCH_CHECK(type == ScalarType::Float || type == pred_type, "reverse_step: x ", describe(x),
        " does not go with pred ", describe(pred));
    inputs.check_data("noise", noise, {type});
    inputs.check_data("x_start_prev", x_start_prev, {type});
    inputs.check_data("variance", variance, {pred_type});
    inputs.check_array("bounds", bounds, ScalarType::Float, {inputs.samples(), 2});
    inputs.check_array("rows", rows, ScalarType::Float, {-1, variance ? 8 : 6});
    const bool shared = step.dim() == 0;
    if (shared) {
      inputs.check_array("step", step, ScalarType::Long, {});
    } else {
      inputs.check_array("step", step, ScalarType::Long, {inputs.samples()});
    }
    inputs.check_index("step", step, rows.size(0));
    const int64_t key_steps = keys && keys->dim() > 0 && keys->size(0) == 1 ? 1 : rows.size(0);
    inputs.check_array("keys", keys, ScalarType::Long, {key_steps, inputs.samples(), 2});
    STD_TORCH_CHECK(!(noise && keys), "reverse_step: give either noise or keys");
    inputs.check_data("x_next", x_next, {type});
    inputs.check_data("x_start", x_start, {type});
    inputs.check_data("model_input", model_input, {pred_type});
    if (x.numel() == 0) return;
    const Guard guard(x);
    Backend::run(ReverseStep{
        .x = data_of(x),
        .pred = data_of(pred),
        .noise = data_of(noise),
        .keys = integers_of(keys),
        .x_start_prev = data_of(x_start_prev),
        .variance = data_of(variance),
        .bounds = floats_of(bounds),
        .step = integers_of(step),
        .rows = floats_of(rows),
        .x_next = target_of(x_next),
        .x_start = target_of(x_start),
        .model_input = target_of(model_input),
        .shape = inputs.shape(),
        .steps = rows.size(0),
        .columns = rows.size(1),
        .key_steps = key_steps,
        .low = static_cast<float>(low),
        .high = static_cast<float>(high),
        .step_is_shared = shared,
        .x_type = type_of(type),
        .pred_type = type_of(pred_type),
    });
  }

  static Tensor vlb_terms(const Tensor& x_start, const Tensor& x_t, const Tensor& pred, const MaybeTensor& variance,
      const Tensor& t, const Tensor& rows, double low, double high) {
    const Inputs inputs("vlb_terms", "x_t", x_t);
    inputs.check_data("x_t", x_t, {ScalarType::Float});
    inputs.check_data("x_start", x_start, {ScalarType::Float, ScalarType::Byte});
    inputs.check_data("pred", pred, floats);
    inputs.check_data("variance", variance, {pred.scalar_type()});
    inputs.check_array("t", t, ScalarType::Long, {inputs.samples()});
    inputs.check_array("rows", rows, ScalarType::Float, {-1, variance ? 8 : 6});
    inputs.check_index("t", t, rows.size(0));
    const Guard guard(x_t);
    Tensor out = inputs.array(ScalarType::Float, {inputs.samples()});
    if (x_t.numel() == 0) return torch::stable::zero_(out);
    run_with_workspace(inputs,
        VlbTerms{
            .x_start = data_of(x_start),
            .x_t = floats_of(x_t),
            .pred = data_of(pred),
            .variance = data_of(variance),
            .t = integers_of(t),
            .rows = floats_of(rows),
            .out = result_of(out),
            .shape = inputs.shape(),
            .timesteps = rows.size(0),
            .columns = rows.size(1),
            .low = static_cast<float>(low),
            .high = static_cast<float>(high),
            .pred_type = type_of(pred.scalar_type()),
            .x_is_bytes = x_start.scalar_type() == ScalarType::Byte,
            .workspace = nullptr,
        });
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias,
      const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, double eps, bool silu) {
    const Inputs inputs("group_norm_silu", "x", x, 2);
    const ScalarType type = x.scalar_type();
    check_parameters("group_norm_silu", inputs, x, x.size(1), weight, bias, scale, shift, groups);
    const Guard guard(x);
    Tensor y = inputs.like_first(type);
    auto [mean, rstd] = new_statistics(inputs, groups, x.numel() == 0);
    if (x.numel() == 0) return {y, mean, rstd};
    run_with_workspace(inputs,
        GroupNormSilu{
            .x = data_of(x),
            .weight = data_of(weight),
            .bias = data_of(bias),
            .scale = data_of(scale),
            .shift = data_of(shift),
            .y = y.mutable_data_ptr(),
            .mean = result_of(mean),
            .rstd = result_of(rstd),
            .shape = inputs.of_channels(),
            .groups = groups,
            .eps = static_cast<float>(eps),
            .silu = silu,
            .x_type = type_of(type),
            .parameter_type = type_of(weight.scalar_type()),
            .workspace = nullptr,
        });
    return {y, mean, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(const Tensor& grad,
      const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
      const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, bool silu) {
    const Inputs inputs("group_norm_silu_backward", "x", x, 2);
    const ScalarType type = x.scalar_type();
    check_parameters("group_norm_silu_backward", inputs, x, x.size(1), weight, bias, scale, shift, groups);
    check_statistics(inputs, mean, rstd, groups);
    inputs.check_data("grad", grad, {type});
    const Guard guard(x);
    Tensor grad_x = inputs.like_first(type);
    auto [grad_weight, grad_bias, grad_scale, grad_shift] = new_gradients(inputs, type, weight, scale);
    if (x.size(1) > 0) {
      run_with_workspace(inputs,
          GroupNormSiluBackward{
              .grad = data_of(grad),
              .x = data_of(x),
              .mean = floats_of(mean),
              .rstd = floats_of(rstd),
              .weight = data_of(weight),
              .bias = data_of(bias),
              .scale = data_of(scale),
              .shift = data_of(shift),
              .grad_x = grad_x.mutable_data_ptr(),
              .grad_weight = grad_weight.mutable_data_ptr(),
              .grad_bias = grad_bias.mutable_data_ptr(),
              .grad_scale = data_if(scale.has_value(), grad_scale),
              .grad_shift = data_if(scale.has_value(), grad_shift),
              .shape = inputs.of_channels(),
              .groups = groups,
              .silu = silu,
              .x_type = type_of(type),
              .parameter_type = type_of(weight.scalar_type()),
              .workspace = nullptr,
          });
    }
    return {grad_x, grad_weight, grad_bias, grad_scale, grad_shift};
  }

  static void register_all(torch::stable::detail::StableLibrary& library) {
    library.impl("fold_in", TORCH_BOX(&Ops::fold_in));
    library.impl("normal", TORCH_BOX(&Ops::normal));
    library.impl("q_sample", TORCH_BOX(&Ops::q_sample));
    library.impl("weighted_loss", TORCH_BOX(&Ops::weighted_loss));
    library.impl("reverse_step", TORCH_BOX(&Ops::reverse_step));
    library.impl("vlb_terms", TORCH_BOX(&Ops::vlb_terms));
    library.impl("group_norm_silu", TORCH_BOX(&Ops::group_norm_silu));
    library.impl("group_norm_silu_backward", TORCH_BOX(&Ops::group_norm_silu_backward));
  }

 protected:
  // Allocates the workspace, sets `arguments.workspace` and runs the kernel. On a GPU the workspace is freed before the
  // kernel has run, which is safe: PyTorch's allocator reuses the memory only for later work on the same stream.
  template <class Arguments>
  static void run_with_workspace(const Inputs& inputs, Arguments arguments) {
    const int64_t size = Backend::workspace_size(arguments);
    std::optional<Tensor> workspace;
    if (size > 0) {
      workspace = inputs.array(ScalarType::Float, {size});
      arguments.workspace = result_of(*workspace);
    }
    Backend::run(arguments);
  }

  // Of a group norm of `channels` channels, those of x among them.
  static void check_parameters(const char* op, const Inputs& inputs, const Tensor& x, int64_t channels,
      const Tensor& weight, const Tensor& bias, const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups) {
    const ScalarType type = weight.scalar_type();
    inputs.check_data("x", x, floats);
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, op, ": ", groups, " groups do not divide ", describe(x));
    STD_TORCH_CHECK(type == ScalarType::Float || type == x.scalar_type(), op, ": weight ", describe(weight),
        " does not go with ", describe(x));
    inputs.check_array("weight", weight, type, {channels});
    inputs.check_array("bias", bias, type, {channels});
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), op, ": give both scale and shift, or neither");
    inputs.check_array("scale", scale, x.scalar_type(), {x.size(0), channels});
    inputs.check_array("shift", shift, x.scalar_type(), {x.size(0), channels});
  }

  static void check_statistics(const Inputs& inputs, const Tensor& mean, const Tensor& rstd, int64_t groups) {
    inputs.check_array("mean", mean, ScalarType::Float, {inputs.samples(), groups});
    inputs.check_array("rstd", rstd, ScalarType::Float, {inputs.samples(), groups});
  }

  struct Statistics {
    Tensor mean, rstd;
  };

  // To be written by a kernel; NaN where groups have no elements, as in the reference.
  static Statistics new_statistics(const Inputs& inputs, int64_t groups, bool empty) {
    const auto of_groups = [&] {
      Tensor array = inputs.array(ScalarType::Float, {inputs.samples(), groups});
      return empty ? torch::stable::fill_(array, std::numeric_limits<double>::quiet_NaN()) : array;
    };
    return {of_groups(), of_groups()};
  }

  struct ParameterGradients {
    Tensor weight, bias, scale, shift;  // the last two are empty where there is no scale
  };

  static ParameterGradients new_gradients(
      const Inputs& inputs, ScalarType type, const Tensor& weight, const MaybeTensor& scale) {
    const int64_t channels = weight.size(0);
    const auto of_all = [&] { return inputs.array(weight.scalar_type(), {channels}); };
    const auto of_sample = [&] {
      return scale ? inputs.array(type, {inputs.samples(), channels}) : inputs.array(type, {0});
    };
    return {of_all(), of_all(), of_sample(), of_sample()};
  }
};

#pragma GCC diagnostic pop

}  // namespace ddpm_fast

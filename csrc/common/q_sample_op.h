// From four tensors to a QSample: what the CPU and the CUDA op share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

#include "common/q_sample.h"

namespace ddpm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " (";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ") " << (tensor.is_cuda() ? "cuda" : "cpu");
  return text.str();
}

inline bool is_any_of(const Tensor& tensor, std::initializer_list<ScalarType> types) {
  return std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end();
}

inline void check_q_sample(const Tensor& x_start, const Tensor& noise, const Tensor& t, const Tensor& rows) {
  const auto device = x_start.device();
  const bool data_fit =
      is_any_of(x_start, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}) &&
      x_start.dim() >= 1 && noise.sizes() == x_start.sizes() && noise.scalar_type() == x_start.scalar_type() &&
      noise.device() == device;
  const bool t_fits = data_fit && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == x_start.size(0) &&
      t.device() == device;
  const bool rows_fit = is_any_of(rows, {ScalarType::Float, ScalarType::Double}) && rows.dim() == 2 &&
      rows.size(1) == 2 && rows.device() == device;
  STD_TORCH_CHECK(data_fit && t_fits && rows_fit,
      "q_sample needs x_start (N, ...) floating, noise of the same shape and dtype, t (N,) int64 and rows (T, 2) "
      "float32, on one device; got x_start ",
      describe(x_start), ", noise ", describe(noise), ", t ", describe(t), ", rows ", describe(rows));
}

// Whether equal indices are equal offsets. The stride of a dimension of size 1 means nothing: a grey
// image is channels-last and contiguous at once.
inline bool is_laid_out_like(const Tensor& tensor, const Tensor& other) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != other.stride(d)) return false;
  }
  return true;
}

inline Tensor laid_out_like(const Tensor& tensor, const Tensor& other) {
  if (is_laid_out_like(tensor, other)) return tensor;
  Tensor copy = torch::stable::empty_like(other);
  return torch::stable::copy_(copy, tensor);
}

// Calls run(QSample<scalar_t>) and returns x_t, with the strides of x_start.
template <class Run>
Tensor q_sample_op(const Tensor& x_start, const Tensor& noise, const Tensor& t, const Tensor& rows, const Run& run) {
  using torch::stable::contiguous;
  check_q_sample(x_start, noise, t, rows);
  Tensor out = torch::stable::empty_like(x_start);  // always dense
  if (out.numel() == 0) return out;

  const int64_t samples = out.size(0), sample_size = out.numel() / samples;
  if (samples > 1 && out.stride(0) != sample_size) {  // interleaved samples
    return torch::stable::copy_(out, q_sample_op(contiguous(x_start), contiguous(noise), t, rows, run));
  }

  const Tensor x = laid_out_like(x_start, out), eps = laid_out_like(noise, out), steps = contiguous(t);
  THO_DISPATCH_V2(x.scalar_type(), "q_sample", AT_WRAP([&] {
    using Acc = Accumulator<scalar_t>;
    const Tensor table = contiguous(torch::stable::to(rows, torch::headeronly::CppTypeToScalarType<Acc>::value));
    run(QSample<scalar_t>{x.const_data_ptr<scalar_t>(), eps.const_data_ptr<scalar_t>(), steps.const_data_ptr<int64_t>(),
        table.const_data_ptr<Acc>(), out.mutable_data_ptr<scalar_t>(), samples, sample_size, rows.size(0)});
  }),
      ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double);
  return out;
}

}  // namespace ddpm_fast

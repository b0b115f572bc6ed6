// Input validation of the strict ops, before the kernels receive pointers to the tensors' memory.
//
// The public functions of ddpm_fast.ops validate their arguments with messages of their own, and convert tensors to the
// form that is required here. The checks here protect direct calls of torch.ops: no call may access memory outside its
// tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "common/arguments.h"

namespace ddpm_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Types = std::initializer_list<ScalarType>;
using Sizes = std::initializer_list<int64_t>;

inline constexpr Types floats = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " (";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ") with strides (";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.stride(d);
  text << ") on " << (tensor.is_cuda() ? "cuda" : "cpu");
  return text.str();
}

inline Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::Byte:
      return Type::u8;
    default:
      return Type::f32;
  }
}

inline bool is_any_of(ScalarType type, Types types) {
  return std::find(types.begin(), types.end(), type) != types.end();
}

// Whether the tensor is dense in this memory format. The strides of dimensions of size 1 are ignored.
inline bool is_dense(const Tensor& x, MemoryFormat format) {
  const int64_t dims = x.dim();
  const bool channels_last = format != MemoryFormat::Contiguous;
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    if (x.size(d) == 1) return true;
    if (x.stride(d) != expected) return false;
    expected *= x.size(d);
    return true;
  };
  if (channels_last && !fits(1)) return false;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (!(channels_last && d == 1) && !fits(d)) return false;
  }
  return true;
}

// The tensors of one call. The first one determines the shape, layout and device that the others must have.
class Inputs {
 public:
  Inputs(const char* op, const char* name, const Tensor& first, int64_t least_dims = 1)
      : op_(op), first_(first), format_(MemoryFormat::Contiguous), device_(first.device()) {
    const int64_t dims = first.dim();
    STD_TORCH_CHECK(dims >= least_dims, op, ": ", name, " needs ", least_dims, " dimensions, got ", describe(first));
    const MemoryFormat last = dims == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
    if ((dims == 4 || dims == 5) && is_dense(first, last)) format_ = last;
    STD_TORCH_CHECK(is_dense(first, format_) || first.numel() == 0, op, ": ", name,
        " is to be contiguous or channels-last, got ", describe(first));
  }

  int64_t samples() const { return first_.size(0); }

  // The shape by which elements are numbered for the noise. Without two image axes, they are numbered in the order of
  // memory: a sample then counts as one channel.
  Shape shape() const {
    if (first_.dim() < 4) return {samples(), 1, product_from(1), false};
    return of_channels();
  }
  Shape of_channels() const {
    const int64_t channels = first_.size(1), plane = product_from(2);
    const bool planar = format_ == MemoryFormat::Contiguous && channels > 1 && plane > 1;
    return {samples(), channels, plane, planar};
  }

  // A tensor of the shape, layout and device of the first, in one of these dtypes.
  void check_data(const char* name, const Tensor& x, Types types) const {
    bool fits = x.dim() == first_.dim() && is_any_of(x.scalar_type(), types) && x.device() == device_;
    for (int64_t d = 0; fits && d < x.dim(); ++d) fits = x.size(d) == first_.size(d);
    STD_TORCH_CHECK(fits && (is_dense(x, format_) || x.numel() == 0), op_, ": ", name, " ", describe(x),
        " does not go, in dtype, shape, layout or device, with ", describe(first_));
  }
  void check_data(const char* name, const std::optional<Tensor>& x, Types types) const {
    if (x) check_data(name, *x, types);
  }

  // A contiguous tensor of these sizes, of which -1 allows any.
  void check_array(const char* name, const Tensor& x, ScalarType type, Sizes sizes) const {
    bool fits = x.dim() == static_cast<int64_t>(sizes.size()) && x.scalar_type() == type && x.device() == device_;
    for (int64_t d = 0; fits && d < x.dim(); ++d) {
      const int64_t size = sizes.begin()[d];
      fits = size == -1 || x.size(d) == size;
    }
    STD_TORCH_CHECK(fits && (is_dense(x, MemoryFormat::Contiguous) || x.numel() == 0), op_, ": ", name, " ",
        describe(x), " does not go, in dtype, shape, layout or device, with ", describe(first_));
  }
  void check_array(const char* name, const std::optional<Tensor>& x, ScalarType type, Sizes sizes) const {
    if (x) check_array(name, *x, type, sizes);
  }

  void check_index(const char* name, const Tensor& index, int64_t count) const {
    if (index.is_cuda()) return;  // the kernels check it: reading it here would wait for the GPU
    const int64_t* values = index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < index.numel(); ++i) {
      STD_TORCH_CHECK(0 <= values[i] && values[i] < count, op_, ": ", name, "[", i, "] is ", values[i],
          ", but rows has ", count, ", counted from 0");
    }
  }

  // A tensor as the first, with any number of channels.
  void check_more_channels(const char* name, const std::optional<Tensor>& x) const {
    if (!x) return;
    bool fits = x->dim() == first_.dim() && x->scalar_type() == first_.scalar_type() && x->device() == device_;
    for (int64_t d = 0; fits && d < x->dim(); ++d) fits = d == 1 || x->size(d) == first_.size(d);
    STD_TORCH_CHECK(fits && (is_dense(*x, format_) || x->numel() == 0), op_, ": ", name, " ", describe(*x),
        " does not go, in dtype, shape but for the channels, layout or device, with ", describe(first_));
  }

  // New tensors on the device of the first: in its shape and layout, with another number of channels, or contiguous in
  // the given sizes.
  Tensor like_first(ScalarType type) const {
    return torch::stable::empty(first_.sizes(), type, std::nullopt, device_, std::nullopt, format_);
  }
  Tensor like_first(int64_t channels) const {
    std::vector<int64_t> sizes(first_.sizes().begin(), first_.sizes().end());
    sizes[1] = channels;
    return torch::stable::empty(sizes, first_.scalar_type(), std::nullopt, device_, std::nullopt, format_);
  }
  Tensor array(ScalarType type, std::initializer_list<int64_t> sizes) const {
    return torch::stable::empty(sizes, type, std::nullopt, device_);
  }

 private:
  int64_t product_from(int64_t d) const {
    int64_t product = 1;
    for (; d < first_.dim(); ++d) product *= first_.size(d);
    return product;
  }

  const char* op_;
  const Tensor& first_;
  MemoryFormat format_;
  torch::stable::Device device_;
};

}  // namespace ddpm_fast

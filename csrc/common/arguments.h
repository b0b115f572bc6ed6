// Plain argument structs of the kernels, without PyTorch types. The ops in ops.h fill them in, and so do the tests.
//
// The arguments of a strict op, and the results that its schema names, are fields of the same name here, with the
// exceptions that tests/ops/test_arguments.py lists. The other fields describe the tensors.
//
// Tensors are dense, and all tensors of a call have the same layout. A sample has `channels` x `plane` elements, stored
// either channels-last (also where there are no image axes) or, if `planar`, one channel after another. Elements of the
// noise are numbered in channels-last order in both layouts. A pointer to an absent tensor is null. Element types are
// float32, bfloat16 and float16; x_start may also be uint8.
#pragma once

#include <cstdint>

namespace ddpm_fast {

enum class Type : int32_t { f32, bf16, f16, u8 };
enum class LossType : int32_t { l2, l1, huber };

struct Shape {
  int64_t samples, channels, plane;
  bool planar;
};

struct FoldIn {
  const int64_t* keys;  // (count, 2): seed, offset
  const int64_t* data;  // (count,)
  int64_t* out;         // (count, 2)
  int64_t count;
};

struct Normal {
  const int64_t* keys;  // (count, 2)
  float* out;           // (count, size)
  int64_t count, size;
};

// out = a x_start + s noise, with (a, s) = rows[t]
struct QSample {
  const void* x_start;  // x_type
  const void* noise;    // x_type, or float32 if x_type is uint8; null if there are keys
  const int64_t* keys;  // (samples, 2); null if there is noise
  const int64_t* t;     // (samples,)
  const float* rows;    // (timesteps, 2)
  void* out;            // out_type
  Shape shape;
  int64_t timesteps;
  Type x_type, out_type;  // x_type is out_type, float32 or uint8
};

// loss[n] = scale weight / sample_size sum |pred - (p x_start + q noise)|, with (p, q, weight) = rows[t]
struct WeightedLoss {
  const void* pred;       // pred_type
  const void* x_start;    // data_type, or uint8 if x_is_bytes, or null
  const void* noise;      // data_type, or null; if keys are null too, q is not read
  const int64_t* keys;    // (samples, 2), or null
  const int64_t* t;       // (samples,)
  const float* rows;      // (timesteps, 3)
  const float* upstream;  // (samples,): factors of the gradient, or null
  float* loss;            // (samples,)
  void* grad;             // pred_type: the gradient of loss with respect to pred, or null
  Shape shape;
  int64_t timesteps;
  float scale;
  LossType loss_type;
  Type pred_type, data_type;  // data_type is pred_type or float32; float32 if x_is_bytes
  bool x_is_bytes;
  float* workspace;  // as many floats as the backend's workspace_size says
};

// x_start = clip(u x + w pred); x_next = A x + B x_start + C x_start_prev + sigma noise,
// with (u, w, A, B, C, sigma[, log lower, log upper]) = rows[step].
// With `variance`, the factor of the noise is exp(0.5 (log lower + (variance + 1) / 2 (log upper - log lower))) where
// sigma > 0, and 0 elsewhere.
// x_next may be the same memory as x, and x_start the same as x_start_prev.
struct ReverseStep {
  const void* x;             // x_type
  const void* pred;          // pred_type
  const void* noise;         // x_type, or null; if keys are null too, there is no noise term
  const int64_t* keys;       // (key_steps, samples, 2), or null
  const void* x_start_prev;  // x_type, or null
  const void* variance;      // pred_type, or null
  const float* bounds;       // (samples, 2): replaces low and high; or null
  const int64_t* step;       // (samples,), or one number if step_is_shared
  const float* rows;         // (steps, columns)
  void* x_next;              // x_type
  void* x_start;             // x_type, or null
  void* model_input;         // pred_type: a copy of x_next, or null
  Shape shape;
  int64_t steps, columns, key_steps;  // columns is 8 with variance, else 6; key_steps is steps, or 1 if all share keys
  float low, high;                    // infinite where there is no bound
  bool step_is_shared;
  Type x_type, pred_type;  // x_type is float32 or pred_type
};

// One term of the variational bound, in nats, with (u, w, c0, cx, log q, log p[, log lower, log upper]) = rows[t]
struct VlbTerms {
  const void* x_start;  // float32, or uint8 if x_is_bytes
  const float* x_t;
  const void* pred;      // pred_type
  const void* variance;  // pred_type, or null
  const int64_t* t;      // (samples,)
  const float* rows;     // (timesteps, columns)
  float* out;            // (samples,)
  Shape shape;
  int64_t timesteps, columns;
  float low, high;
  Type pred_type;
  bool x_is_bytes;
  float* workspace;  // as many floats as the backend's workspace_size says
};

// y = silu(((x - mean) rstd weight + bias) (1 + scale) + shift). Without `silu`, y is the argument of that function.
// scale and shift are both given, or both null.
struct GroupNormSilu {
  const void* x;       // x_type
  const void* weight;  // (channels,) parameter_type
  const void* bias;    // (channels,) parameter_type
  const void* scale;   // (samples, channels) x_type, or null
  const void* shift;   // like scale
  void* y;             // x_type
  float* mean;         // (samples, groups)
  float* rstd;         // (samples, groups)
  Shape shape;
  int64_t groups;
  float eps;
  bool silu;
  Type x_type, parameter_type;  // parameter_type is x_type or float32
  float* workspace;             // as many floats as the backend's workspace_size says
};

// The gradients of the inputs of GroupNormSilu, given the gradient of y.
struct GroupNormSiluBackward {
  const void* grad;    // x_type
  const void* x;       // x_type
  const float* mean;   // (samples, groups)
  const float* rstd;   // (samples, groups)
  const void* weight;  // (channels,) parameter_type
  const void* bias;    // (channels,) parameter_type
  const void* scale;   // (samples, channels) x_type, or null
  const void* shift;
  void* grad_x;       // x_type
  void* grad_weight;  // (channels,) parameter_type
  void* grad_bias;    // (channels,) parameter_type
  void* grad_scale;   // (samples, channels) x_type, or null
  void* grad_shift;
  Shape shape;
  int64_t groups;
  bool silu;
  Type x_type, parameter_type;
  float* workspace;  // as many floats as the backend's workspace_size says
};

// The same of h = cat([x + input_bias + residual, skip]), rounded to x_type. `shape` is that of h; x and residual have
// the first `channels` of its channels, and skip the others. All are channels-last where something is added.
struct AddGroupNormSilu {
  const void* x;           // x_type
  const void* input_bias;  // (channels,) or (samples, channels) input_bias_type, or null
  const void* residual;    // x_type, or null
  const void* skip;        // x_type, or null
  const void* weight;      // (shape.channels,) parameter_type
  const void* bias;        // (shape.channels,) parameter_type
  const void* scale;       // (samples, shape.channels) x_type, or null
  const void* shift;       // like scale
  void* y;                 // x_type
  void* h;                 // x_type; may be null if there is neither a residual nor a skip
  float* mean;             // (samples, groups)
  float* rstd;             // (samples, groups)
  Shape shape;
  int64_t channels;
  int64_t input_bias_stride;  // elements from one sample's row to the next; 0: all samples have the same
  int64_t groups;
  float eps;
  bool silu;
  Type x_type, parameter_type, input_bias_type;  // the last two are x_type or float32
  float* workspace;                              // as many floats as the backend's workspace_size says
};

// The y of AddGroupNormSilu without scale and shift, from the statistics that it computed. x is channels-last: h, or
// what only input_bias is added to.
struct RecomputeGroupNormSilu {
  const void* x;           // x_type
  const void* input_bias;  // as above
  const float* mean;       // (samples, groups)
  const float* rstd;       // (samples, groups)
  const void* weight;      // (channels,) parameter_type
  const void* bias;        // (channels,) parameter_type
  void* y;                 // x_type
  Shape shape;
  int64_t input_bias_stride;
  int64_t groups;
  bool silu;
  Type x_type, parameter_type, input_bias_type;
};

// The gradients of the inputs of AddGroupNormSilu, given those of y and h. That of a residual is that of x.
struct AddGroupNormSiluBackward {
  const void* grad;        // x_type
  const void* grad_sum;    // x_type, or null: the gradient of h, beside what comes through y
  const void* x;           // x_type; h if `kept`
  const void* input_bias;  // as above; what is given has a gradient
  const float* mean;       // (samples, groups)
  const float* rstd;       // (samples, groups)
  const void* weight;      // (shape.channels,) parameter_type
  const void* bias;        // (shape.channels,) parameter_type
  const void* scale;       // (samples, shape.channels) x_type, or null
  const void* shift;
  void* grad_x;           // x_type
  void* grad_skip;        // x_type, or null
  void* grad_input_bias;  // dense, of the shape and type of input_bias, or null
  void* grad_weight;      // (shape.channels,) parameter_type
  void* grad_bias;        // (shape.channels,) parameter_type
  void* grad_scale;       // (samples, shape.channels) x_type, or null
  void* grad_shift;
  Shape shape;
  int64_t channels;
  int64_t input_bias_stride;
  int64_t groups;
  bool silu, kept;
  Type x_type, parameter_type, input_bias_type;
  float* workspace;  // as many floats as the backend's workspace_size says
};

}  // namespace ddpm_fast

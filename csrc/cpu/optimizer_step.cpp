// AdamW, LAMB and the gradient norm over lists of tensors; formulas and dtypes in bertfast/ops/optimizer_step.py.
//
// All tensors together are one sequence of blocks of at most BLOCK elements, shared evenly between threads, so that
// it does not matter whether the elements lie in one table or in hundreds of biases. Sums are fp32 within a block,
// then fp64 over blocks in order: the same bits for any number of threads.

#include <torch/library.h>

#include <vector>

#include "common.h"

namespace bertfast {
namespace {

constexpr int64_t BLOCK = 4096;

// Calls f(block, tensor, begin, end) for every block of tensors with these sizes, in parallel.
struct Blocks {
  std::vector<int64_t> sizes, first{0};  // first[i]: the block at which tensor i begins

  explicit Blocks(at::TensorList tensors) {
    for (const at::Tensor& t : tensors) {
      sizes.push_back(t.numel());
      first.push_back(first.back() + (t.numel() + BLOCK - 1) / BLOCK);
    }
  }
  int64_t count() const { return first.back(); }

  template <typename F>
  void for_each(F&& f) const {
    for_parts(count(), n_parts(count(), BLOCK), [&](int64_t, int64_t begin, int64_t end) {
      int64_t tensor = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      for (int64_t block = begin; block < end; block++) {
        while (block >= first[tensor + 1]) tensor++;  // empty tensors have no block
        const int64_t at = (block - first[tensor]) * BLOCK;
        f(block, tensor, at, std::min(at + BLOCK, sizes[tensor]));
      }
    });
  }
};

template <typename scalar_t>
double square_sum(const scalar_t* p, int64_t n) {
  F32 total;
  for_columns(n, [&](int64_t j, auto size) {
    const F32 x = F32::load(p + j, size);
    total = fma(x, x, total);
  });
  return sum(total);
}

struct Coefficients {
  F32 grad_scale, keep1, take1, keep2, take2, unbias1, unbias2, eps, weight_decay, lr;
};

template <typename grad_t, typename S>
inline void update_moments(const grad_t* grad, float* exp_avg, float* exp_avg_sq, S size, const Coefficients& c) {
  const F32 g = F32::load(grad, size) * c.grad_scale;
  fma(c.take1, g, c.keep1 * F32::load(exp_avg, size)).store(exp_avg, size);
  fma(c.take2 * g, g, c.keep2 * F32::load(exp_avg_sq, size)).store(exp_avg_sq, size);
}

template <typename S>
inline F32 direction(const float* exp_avg, const float* exp_avg_sq, S size, const Coefficients& c) {
  return F32::load(exp_avg, size) * c.unbias1 / fma(sqrt(F32::load(exp_avg_sq, size)), c.unbias2, c.eps);
}

// A master is fp32, with a compute copy `param` or, where the parameter is its own master, null; or it is what a bf16
// parameter leaves of 32 bits.
template <typename param_t, typename S>
inline F32 load_master(const param_t*, const float* master, S size) {
  return F32::load(master, size);
}
template <typename S>
inline F32 load_master(const c10::BFloat16* param, const int16_t* master, S size) {
  return F32::join(param, master, size);
}
template <typename param_t, typename S>
inline void store_master(F32 value, param_t* param, float* master, S size) {
  value.store(master, size);
  if (param) value.store(param, size);
}
template <typename S>
inline void store_master(F32 value, c10::BFloat16* param, int16_t* master, S size) {
  value.split(param, master, size);
}
template <typename T>
inline T* advanced(T* p, int64_t n) {
  return p ? p + n : p;
}

template <typename param_t, typename grad_t, typename master_t>
void adamw_block(param_t* param, const grad_t* grad, master_t* master, float* exp_avg, float* exp_avg_sq, int64_t n,
                 const Coefficients& c) {
  for_columns(n, [&](int64_t j, auto size) {
    update_moments(grad + j, exp_avg + j, exp_avg_sq + j, size, c);
    const F32 w = load_master(advanced(param, j), master + j, size);
    const F32 u = fma(c.weight_decay, w, direction(exp_avg + j, exp_avg_sq + j, size, c));
    store_master(fnma(c.lr, u, w), advanced(param, j), master + j, size);
  });
}

// LAMB's first pass: the moments, and |master|^2 and |u|^2 of the block for the trust ratio.
template <typename param_t, typename grad_t, typename master_t>
std::array<double, 2> lamb_norms(const param_t* param, const grad_t* grad, const master_t* master, float* exp_avg,
                                 float* exp_avg_sq, int64_t n, const Coefficients& c) {
  F32 master_sq, u_sq;
  for_columns(n, [&](int64_t j, auto size) {
    update_moments(grad + j, exp_avg + j, exp_avg_sq + j, size, c);
    const F32 w = load_master(advanced(param, j), master + j, size);
    const F32 u = keep(size, fma(c.weight_decay, w, direction(exp_avg + j, exp_avg_sq + j, size, c)));
    master_sq = fma(w, w, master_sq);
    u_sq = fma(u, u, u_sq);
  });
  return {sum(master_sq), sum(u_sq)};
}

// LAMB's second pass, with lr times the tensor's trust ratio.
template <typename param_t, typename master_t>
void lamb_block(param_t* param, master_t* master, const float* exp_avg, const float* exp_avg_sq, int64_t n, F32 lr,
                const Coefficients& c) {
  for_columns(n, [&](int64_t j, auto size) {
    const F32 w = load_master(advanced(param, j), master + j, size);
    const F32 updated = fnma(lr, fma(c.weight_decay, w, direction(exp_avg + j, exp_avg_sq + j, size, c)), w);
    store_master(updated, advanced(param, j), master + j, size);
  });
}

// Calls f with the float32 or bfloat16 data of t from element `at` on.
template <typename F>
auto with_data(const at::Tensor& t, int64_t at, F&& f) {
  return t.scalar_type() == at::kBFloat16 ? f(static_cast<c10::BFloat16*>(t.data_ptr()) + at)
                                          : f(static_cast<float*>(t.data_ptr()) + at);
}

void check_dtype(const at::Tensor& t, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name,
                              " on CPU must be float32 or bfloat16, not ", t.scalar_type());
}

template <typename T>
T* state_data(const at::Tensor& t, const at::Tensor& param, const char* name) {
  TORCH_CHECK(t.scalar_type() == c10::CppTypeToScalarType<T>::value && t.is_contiguous() && t.sizes() == param.sizes(),
              name, " must be ", c10::CppTypeToScalarType<T>::value, ", contiguous and of the parameter's shape ",
              param.sizes(), ", got ", t.scalar_type(), " ", t.sizes());
  return t.mutable_data_ptr<T>();
}

// The arguments of a step, checked; state[i]: exp_avg, exp_avg_sq of params[i].
struct Step {
  at::TensorList params, masters;
  std::vector<at::Tensor> grads;
  std::vector<std::array<float*, 2>> state;
  Coefficients c;

  // Calls f with the data of parameter and master i from element `at` on; the first is null where there are no masters.
  template <typename F>
  auto with_master(int64_t i, int64_t at, F&& f) const {
    const at::Tensor& param = params[i];
    if (masters.empty()) {
      return f(static_cast<float*>(nullptr), state_data<float>(param, param, "a parameter without a master") + at);
    }
    if (masters[i].scalar_type() == at::kShort) {
      return f(state_data<c10::BFloat16>(param, param, "a parameter whose master is int16") + at,
               state_data<int16_t>(masters[i], param, "masters") + at);
    }
    float* master = state_data<float>(masters[i], param, "masters") + at;
    return with_data(param, at, [&](auto* p) { return f(p, master); });
  }

  Step(at::TensorList params_, at::TensorList grads_, at::TensorList masters_, at::TensorList exp_avgs,
       at::TensorList exp_avg_sqs, const at::Tensor& lr, const at::Tensor& step, const at::Tensor& grad_scale,
       double beta1, double beta2, double eps, double weight_decay)
      : params(params_), masters(masters_) {
    const size_t n = params.size();
    TORCH_CHECK_VALUE(grads_.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                          (masters.empty() || masters.size() == n),
                      "params, grads, exp_avgs and exp_avg_sqs need the same length, masters as well or 0");
    for (size_t i = 0; i < n; i++) {
      const at::Tensor& param = params[i];
      check_dtype(param, "params");
      check_dtype(grads_[i], "grads");
      TORCH_CHECK(param.is_contiguous() && grads_[i].sizes() == param.sizes(), "params must be contiguous and grads ",
                  "of their shape, got ", param.sizes(), " and ", grads_[i].sizes());
      grads.push_back(grads_[i].contiguous());
      with_master(i, 0, [](auto*, auto*) {});  // checks both
      state.push_back({state_data<float>(exp_avgs[i], param, "exp_avgs"),
                       state_data<float>(exp_avg_sqs[i], param, "exp_avg_sqs")});
    }
    const double t = step.item().toDouble();
    c = {static_cast<float>(grad_scale.item().toDouble()),
         static_cast<float>(beta1),
         static_cast<float>(1 - beta1),
         static_cast<float>(beta2),
         static_cast<float>(1 - beta2),
         static_cast<float>(1 / (1 - std::pow(beta1, t))),
         static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
         static_cast<float>(eps),
         static_cast<float>(weight_decay),
         static_cast<float>(lr.item().toDouble())};
  }
};

void adamw_step_cpu(at::TensorList params, at::TensorList grads, at::TensorList masters, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, const at::Tensor& lr, const at::Tensor& step,
                    const at::Tensor& grad_scale, const at::Tensor& skip, double beta1, double beta2, double eps,
                    double weight_decay) {
  const Step s(params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, beta1, beta2, eps, weight_decay);
  if (skip.item().toDouble() != 0) return;
  Blocks(params).for_each([&](int64_t, int64_t i, int64_t begin, int64_t end) {
    const auto [exp_avg, exp_avg_sq] = s.state[i];
    s.with_master(i, begin, [&](auto* param, auto* master) {
      with_data(s.grads[i], begin, [&](const auto* grad) {
        adamw_block(param, grad, master, exp_avg + begin, exp_avg_sq + begin, end - begin, s.c);
      });
    });
  });
}

void lamb_step_cpu(at::TensorList params, at::TensorList grads, at::TensorList masters, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, const at::Tensor& lr, const at::Tensor& step,
                   const at::Tensor& grad_scale, const at::Tensor& skip, double beta1, double beta2, double eps,
                   double weight_decay) {
  const Step s(params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, beta1, beta2, eps, weight_decay);
  if (skip.item().toDouble() != 0) return;
  const Blocks blocks(params);
  std::vector<std::array<double, 2>> norms(blocks.count());
  blocks.for_each([&](int64_t block, int64_t i, int64_t begin, int64_t end) {
    const auto [exp_avg, exp_avg_sq] = s.state[i];
    norms[block] = s.with_master(i, begin, [&](auto* param, auto* master) {
      return with_data(s.grads[i], begin, [&](const auto* grad) {
        return lamb_norms(param, grad, master, exp_avg + begin, exp_avg_sq + begin, end - begin, s.c);
      });
    });
  });
  std::vector<double> trust(params.size());
  for (size_t i = 0; i < trust.size(); i++) {
    double master_sq = 0, u_sq = 0;
    for (int64_t block = blocks.first[i]; block < blocks.first[i + 1]; block++) {
      master_sq += norms[block][0], u_sq += norms[block][1];
    }
    trust[i] = master_sq > 0 && u_sq > 0 ? std::sqrt(master_sq / u_sq) : 1.0;
  }
  blocks.for_each([&](int64_t, int64_t i, int64_t begin, int64_t end) {
    const auto [exp_avg, exp_avg_sq] = s.state[i];
    const F32 lr_i(static_cast<float>(lr.item().toDouble() * trust[i]));
    s.with_master(i, begin, [&](auto* param, auto* master) {
      lamb_block(param, master, exp_avg + begin, exp_avg_sq + begin, end - begin, lr_i, s.c);
    });
  });
}

at::Tensor grad_norm_cpu(at::TensorList grads) {
  std::vector<at::Tensor> dense;
  for (const at::Tensor& grad : grads) {
    check_dtype(grad, "grads");
    dense.push_back(grad.contiguous());
  }
  const Blocks blocks(grads);
  double* sums = scratch<double>(blocks.count());
  blocks.for_each([&](int64_t block, int64_t i, int64_t begin, int64_t end) {
    sums[block] = with_data(dense[i], begin, [&](const auto* grad) { return square_sum(grad, end - begin); });
  });
  double total = 0;
  for (int64_t block = 0; block < blocks.count(); block++) total += sums[block];
  at::Tensor norm = empty({}, at::TensorOptions(at::kFloat));
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("adamw_step", &bertfast::adamw_step_cpu);
  m.impl("lamb_step", &bertfast::lamb_step_cpu);
  m.impl("grad_norm", &bertfast::grad_norm_cpu);
}

// The extension ser_fast._C_cuda: the operators on tensors of a GPU. Their schemas are those of ser_fast._C, which has
// to be loaded first.
//
// With SER_FAST_HOST the kernels are those that a host runs (tests/host_cuda), and those of nt_xent are registered for
// tensors of the CPU.

#ifndef SER_FAST_HOST
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "bindings.h"
#include "common/tiles.h"
#ifndef SER_FAST_HOST
#include "cuda/group_action.h"
#endif
#include "cuda/nt_xent_panels.h"
#include "cuda/nt_xent_rows.h"
#include "cuda/nt_xent_stationary.h"
#include "cuda/nt_xent_tiles.h"

namespace {

namespace cuda = ser_fast::cuda;
using cuda::Operand, cuda::PanelOperand, cuda::Positives, cuda::RowSet;
using ser_fast::data, ser_fast::make_resampling, ser_fast::output, ser_fast::Tensor, ser_fast::type_of;

// launch(stream), on the device of x and on its current stream.
template <typename Launch>
void on_device_of([[maybe_unused]] const Tensor& x, const char* what, const Launch& launch) {
#ifdef SER_FAST_HOST
  const char* error = launch(nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = launch(stream);
#endif
  STD_TORCH_CHECK(error == nullptr, what, " on cuda: ", error);
}

#ifndef SER_FAST_HOST
void group_action(Tensor x, Tensor linear, Tensor offset, Tensor out, std::vector<int64_t> sizes, int64_t interpolation,
                  int64_t padding, bool antialias, bool transpose) {
  on_device_of(x, "group_action", [&](void* stream) {
    return cuda::group_action(x.const_data_ptr(), data<double>(linear), data<double>(offset), out.mutable_data_ptr(),
                              type_of(x), x.size(0), x.size(2), {sizes[0], sizes[1], sizes[2], sizes[3]},
                              make_resampling(interpolation, padding, antialias), transpose, stream);
  });
}
#endif

// Rows [x0; x1] of the same columns; x1 may have none.
RowSet rows_of(const Tensor& x0, const Tensor& x1) {
  return {x0.const_data_ptr(), x1.const_data_ptr(), x0.size(0), x0.size(0) + x1.size(0), x0.size(1)};
}

int64_t padded_of(const Tensor& table) { return ser_fast::table_rows(table.size(0)); }

Operand operand(const Tensor& u, const Tensor& table, const Tensor& weights, bool needed) {
  return {data<int64_t>(table), needed ? data<float>(weights) : nullptr, u.const_data_ptr(), u.size(0)};
}

PanelOperand panel_operand(const Tensor& table, const Tensor& weights, bool needed) {
  return {data<int64_t>(table), needed ? weights.const_data_ptr() : nullptr, padded_of(table)};
}

void nt_xent_prepare(Tensor x0, Tensor x1, Tensor image, Tensor valid, Tensor u, Tensor table, bool normalize) {
  on_device_of(u, "nt_xent_prepare", [&](void* stream) {
    return cuda::prepare(rows_of(x0, x1), type_of(x0), normalize, data<int64_t>(image), data<bool>(valid),
                         output<void>(u), type_of(u), u.size(0), u.size(1), output<int64_t>(table), stream);
  });
}

void nt_xent_symmetric_sums(Tensor u, Tensor table, Tensor sums, Tensor kept, double scale, int64_t count) {
  on_device_of(u, "nt_xent_symmetric_sums", [&](void* stream) {
    return cuda::symmetric_sums(u.const_data_ptr(), data<int64_t>(table), count, u.size(0), u.size(1),
                                output<int64_t>(sums), output<void>(kept), static_cast<float>(scale), stream);
  });
}

// state: (2, splits, q_padded).
void nt_xent_row_sums(Tensor q, Tensor q_table, Tensor k, Tensor k_table, Tensor state, double scale, int64_t keys) {
  on_device_of(q, "nt_xent_row_sums", [&](void* stream) {
    return cuda::row_sums(q.const_data_ptr(), data<int64_t>(q_table), q.size(0), k.const_data_ptr(),
                          data<int64_t>(k_table), k.size(0), q.size(1), keys, output<float>(state), state.size(1),
                          static_cast<float>(scale), stream);
  });
}

cuda::Panel panel_at(const Tensor& panel, int64_t first_row, int64_t first_key) {
  return {panel.mutable_data_ptr(), first_row, first_key, panel.size(0), panel.size(1)};
}

// state: (2, 1, q_padded).
void nt_xent_panel_row_sums(Tensor panel, Tensor q_table, Tensor k_table, Tensor state, int64_t first_row,
                            int64_t first_key) {
  on_device_of(panel, "nt_xent_panel_row_sums", [&](void* stream) {
    return cuda::panel_row_sums(panel_at(panel, first_row, first_key), type_of(panel),
                                panel_operand(q_table, state, false), panel_operand(k_table, state, false),
                                output<void>(state), stream);
  });
}

Positives positives(const Tensor& q0, const Tensor& q1, const Tensor& k0, const Tensor& k1, const Tensor& positive,
                    const Tensor& table, double temperature, bool views, bool normalize) {
  return {rows_of(q0, q1),         rows_of(k0, k1),      type_of(q0),      normalize,  views,
          data<int64_t>(positive), data<int64_t>(table), padded_of(table), temperature};
}

// state: (4, padded) integers if `summed`, else (2, splits, padded).
void nt_xent_losses(Tensor q0, Tensor q1, Tensor k0, Tensor k1, Tensor positive, Tensor table, Tensor state,
                    Tensor loss, double temperature, bool views, bool summed, bool normalize) {
  on_device_of(q0, "nt_xent_losses", [&](void* stream) {
    return cuda::losses(positives(q0, q1, k0, k1, positive, table, temperature, views, normalize),
                        state.const_data_ptr(), summed, summed ? 1 : state.size(1), output<void>(loss), stream);
  });
}

void nt_xent_gradient_weights(Tensor q0, Tensor q1, Tensor k0, Tensor k1, Tensor positive, Tensor table, Tensor weight,
                              Tensor largest, Tensor loss, Tensor out, double temperature, bool views, bool bounded,
                              bool library, bool normalize) {
  on_device_of(q0, "nt_xent_gradient_weights", [&](void* stream) {
    return cuda::gradient_weights(positives(q0, q1, k0, k1, positive, table, temperature, views, normalize),
                                  weight.const_data_ptr(), largest.const_data_ptr(), loss.const_data_ptr(), bounded,
                                  library, output<void>(out), stream);
  });
}

// out: (splits, q_padded, columns).
void nt_xent_stationary_gradient(Tensor q, Tensor q_table, Tensor q_weights, Tensor k, Tensor k_table, Tensor k_weights,
                                 Tensor out, double scale, int64_t keys, bool bounded, bool by_row, bool by_key) {
  on_device_of(q, "nt_xent_stationary_gradient", [&](void* stream) {
    return cuda::stationary_gradient(operand(q, q_table, q_weights, by_row), operand(k, k_table, k_weights, by_key),
                                     q.size(1), keys, output<float>(out), out.size(0), static_cast<float>(scale),
                                     bounded, stream);
  });
}

void nt_xent_gradient_panel(Tensor q, Tensor q_table, Tensor q_weights, Tensor k, Tensor k_table, Tensor k_weights,
                            Tensor kept, Tensor panel, double scale, int64_t first_row, int64_t first_key,
                            int64_t source, bool bounded, bool by_row, bool by_key) {
  on_device_of(q, "nt_xent_gradient_panel", [&](void* stream) {
    const cuda::Panel to = panel_at(panel, first_row, first_key);
    const PanelOperand rows = panel_operand(q_table, q_weights, by_row);
    const PanelOperand keys = panel_operand(k_table, k_weights, by_key);
    switch (static_cast<ser_fast::Source>(source)) {
      case ser_fast::Source::product: break;
      case ser_fast::Source::library: return cuda::gradient_panel_from_library(to, type_of(panel), rows, keys, stream);
      case ser_fast::Source::kept:
      case ser_fast::Source::kept_diagonal:
        return cuda::gradient_panel_from_kept(to, kept.const_data_ptr(), rows, keys, stream);
    }
    return cuda::gradient_panel(operand(q, q_table, q_weights, by_row), operand(k, k_table, k_weights, by_key),
                                q.size(1), to.at, first_row, first_key, to.rows, to.width, static_cast<float>(scale),
                                bounded, stream);
  });
}

// accumulated: (splits, padded, dim). weights: (3, padded) of the rows whose losses they are.
void nt_xent_finish_gradient(Tensor x0, Tensor x1, Tensor y0, Tensor y1, Tensor table, Tensor weights, Tensor positive,
                             Tensor order, Tensor first, Tensor accumulated, Tensor largest, Tensor d_x0, Tensor d_x1,
                             double temperature, int64_t side, bool library, bool normalize) {
  on_device_of(x0, "nt_xent_finish_gradient", [&](void* stream) {
    const cuda::Gradient of{static_cast<ser_fast::Side>(side),
                            weights.const_data_ptr(),
                            weights.size(1),
                            data<int64_t>(positive),
                            data<int64_t>(order),
                            data<int64_t>(first),
                            accumulated.const_data_ptr(),
                            accumulated.size(0),
                            accumulated.size(2),
                            largest.const_data_ptr(),
                            library};
    return cuda::finish_gradient(rows_of(x0, x1), rows_of(y0, y1), type_of(x0), normalize, data<int64_t>(table),
                                 padded_of(table), of, temperature, output<void>(d_x0), output<void>(d_x1),
                                 type_of(d_x0), stream);
  });
}

// state: (2, splits, q_padded), out: (splits, q_padded, columns).
void nt_xent_detached_sums(Tensor q, Tensor q_table, Tensor k, Tensor k_table, Tensor state, Tensor out, double scale,
                           int64_t keys, bool bounded) {
  on_device_of(q, "nt_xent_detached_sums", [&](void* stream) {
    return cuda::detached_sums(operand(q, q_table, state, false), operand(k, k_table, state, false), q.size(1), keys,
                               output<float>(state), output<float>(out), out.size(0), static_cast<float>(scale),
                               bounded, stream);
  });
}

void nt_xent_finish_detached(Tensor query, Tensor key, Tensor positive, Tensor table, Tensor state, Tensor accumulated,
                             Tensor loss, Tensor gradient, double temperature, bool normalize) {
  on_device_of(query, "nt_xent_finish_detached", [&](void* stream) {
    const RowSet queries{query.const_data_ptr(), nullptr, query.size(0), query.size(0), query.size(1)};
    const RowSet keys{key.const_data_ptr(), nullptr, key.size(0), key.size(0), key.size(1)};
    const Positives of{
        queries,          keys,       type_of(query), normalize, false, data<int64_t>(positive), data<int64_t>(table),
        padded_of(table), temperature};
    return cuda::finish_detached(of, data<float>(state), data<float>(accumulated), accumulated.size(0),
                                 accumulated.size(2), output<float>(loss), output<float>(gradient), stream);
  });
}

}  // namespace

#ifdef SER_FAST_HOST
STABLE_TORCH_LIBRARY_IMPL(ser_fast_native, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ser_fast_native, CUDA, m) {
  m.impl("group_action", TORCH_BOX(&group_action));
#endif
  m.impl("nt_xent_prepare", TORCH_BOX(&nt_xent_prepare));
  m.impl("nt_xent_symmetric_sums", TORCH_BOX(&nt_xent_symmetric_sums));
  m.impl("nt_xent_row_sums", TORCH_BOX(&nt_xent_row_sums));
  m.impl("nt_xent_panel_row_sums", TORCH_BOX(&nt_xent_panel_row_sums));
  m.impl("nt_xent_losses", TORCH_BOX(&nt_xent_losses));
  m.impl("nt_xent_gradient_weights", TORCH_BOX(&nt_xent_gradient_weights));
  m.impl("nt_xent_stationary_gradient", TORCH_BOX(&nt_xent_stationary_gradient));
  m.impl("nt_xent_gradient_panel", TORCH_BOX(&nt_xent_gradient_panel));
  m.impl("nt_xent_finish_gradient", TORCH_BOX(&nt_xent_finish_gradient));
  m.impl("nt_xent_detached_sums", TORCH_BOX(&nt_xent_detached_sums));
  m.impl("nt_xent_finish_detached", TORCH_BOX(&nt_xent_finish_detached));
}

#ifndef SER_FAST_HOST
// `import ser_fast._C_cuda` registers the kernels; there is nothing else in the module.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
#endif

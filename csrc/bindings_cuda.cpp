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
using ser_fast::accumulator_of, ser_fast::Arguments, ser_fast::data, ser_fast::dtype_of, ser_fast::kAny;
using ser_fast::kTile, ser_fast::make_resampling, ser_fast::output, ser_fast::ScalarType, ser_fast::Tensor;
using ser_fast::Type, ser_fast::type_of;

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
  const ser_fast::Lattices lattices =
      ser_fast::check_group_action(x, linear, offset, out, sizes, interpolation, padding, transpose);
  on_device_of(x, "group_action", [&](void* stream) {
    return cuda::group_action(x.const_data_ptr(), data<double>(linear), data<double>(offset), out.mutable_data_ptr(),
                              type_of(x), x.size(0), x.size(2), lattices,
                              make_resampling(interpolation, padding, antialias), transpose, stream);
  });
}
#endif

// ------------------------------------------------------------------------------------------------ checks

constexpr int64_t kColumns = 64;  // operands, and what is accumulated, have multiples of so many

// x begins at a multiple of 16 bytes, as all memory of torch's does.
void check_aligned(const Arguments& check, const char* name, const Tensor& x) {
  check.that(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name, "a part of a tensor that is not aligned",
             "one that begins at a multiple of 16 bytes");
}

// Rows [x0; x1], and their number.
struct CheckedRows {
  Type type;
  int64_t count;
};
CheckedRows check_rows(const Arguments& check, const char* name0, const Tensor& x0, const char* name1,
                       const Tensor& x1) {
  const Type type = check.floats(name0, x0, {kAny, kAny});
  check.tensor(name1, x1, dtype_of(type), {kAny, x0.size(1)});
  check.number("columns", x0.size(1), 1, std::numeric_limits<int32_t>::max());
  return {type, x0.size(0) + x1.size(0)};
}

// A table of rows that are padded to whole tiles; returns how many these are.
int64_t check_table(const Arguments& check, const char* name, const Tensor& table, int64_t least_rows = 0) {
  check.tensor(name, table, ScalarType::Long, {kAny});
  const int64_t rows = ser_fast::table_rows(table.size(0));
  check.that(ser_fast::table_size(rows) == table.size(0) && rows % kTile == 0, name, "another length",
             "that of whole tiles of rows");
  check.number("rows", least_rows, 0, rows);
  return rows;
}

// An operand (rows, columns) of products in float16, and its table.
void check_operand(const Arguments& check, const char* name, const Tensor& u, const char* table_name,
                   const Tensor& table, int64_t columns = kAny) {
  check.tensor(name, u, ScalarType::Half, {check_table(check, table_name, table), columns});
  check.that(u.size(1) > 0 && u.size(1) % kColumns == 0, name, "other columns", "a multiple of 64");
  check_aligned(check, name, u);
}

// (3, padded) of the side that gives a part of G.
void check_weights(const Arguments& check, const char* name, const Tensor& weights, ScalarType real,
                   const Tensor& table, bool given) {
  if (given) check.tensor(name, weights, real, {3, ser_fast::table_rows(table.size(0))});
}

// Queries, keys and the key that is each query's positive; returns what they are and how many queries there are.
CheckedRows check_positives(const Arguments& check, const Tensor& q0, const Tensor& q1, const Tensor& k0,
                            const Tensor& k1, const Tensor& positive, const Tensor& table, double temperature,
                            bool views) {
  check.temperature(temperature);
  const CheckedRows queries = check_rows(check, "q0", q0, "q1", q1);
  check.tensor("k0", k0, dtype_of(queries.type), {views ? q0.size(0) : kAny, q0.size(1)});
  check.tensor("k1", k1, dtype_of(queries.type), {views ? q0.size(0) : kAny, q0.size(1)});
  if (views) {
    check.tensor("q1", q1, dtype_of(queries.type), {q0.size(0), q0.size(1)});
  } else {
    check.tensor("positive", positive, ScalarType::Long, {queries.count});
    check.that(queries.count == 0 || k0.size(0) + k1.size(0) > 0, "k0", "no keys", "at least one");
  }
  check_table(check, "table", table, queries.count);
  return queries;
}

// A panel of `dtype`, of whole tiles, whose corner and size lie within the matrix of the two sides.
void check_panel(const Arguments& check, const Tensor& panel, ScalarType dtype, const Tensor& q_table,
                 const Tensor& k_table, int64_t first_row, int64_t first_key) {
  check.tensor("panel", panel, dtype, {kAny, kAny});
  check.that(panel.size(0) % kTile == 0 && panel.size(1) % kTile == 0, "panel", "another size", "whole tiles");
  check_aligned(check, "panel", panel);
  check.number("first_row", first_row, 0, check_table(check, "q_table", q_table, panel.size(0)) - panel.size(0));
  check.number("first_key", first_key, 0, check_table(check, "k_table", k_table, panel.size(1)) - panel.size(1));
}

// ------------------------------------------------------------------------------------------------ operators

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
  const Arguments check("nt_xent_prepare", u);
  const CheckedRows rows = check_rows(check, "x0", x0, "x1", x1);
  check.number("x1 (rows)", x1.size(0), 0, x0.size(0));
  check.tensor("image", image, ScalarType::Long, {x0.size(0)});
  check.tensor("valid", valid, ScalarType::Bool, {x0.size(0)});
  const bool half = u.scalar_type() == ScalarType::Half && ser_fast::bytes_of(rows.type) == 2;
  check.tensor("u", u, half ? ScalarType::Half : accumulator_of(rows.type),
               {check_table(check, "table", table, rows.count), kAny});
  check.that(u.size(1) >= x0.size(1) && u.size(1) % kColumns == 0, "u", "other columns", "x0's, in multiples of 64");
  check_aligned(check, "u", u);
  on_device_of(u, "nt_xent_prepare", [&](void* stream) {
    return cuda::prepare(rows_of(x0, x1), type_of(x0), normalize, data<int64_t>(image), data<bool>(valid),
                         output<void>(u), type_of(u), u.size(0), u.size(1), output<int64_t>(table), stream);
  });
}

void nt_xent_symmetric_sums(Tensor u, Tensor table, Tensor sums, Tensor kept, double scale, int64_t count) {
  const Arguments check("nt_xent_symmetric_sums", u);
  check_operand(check, "u", u, "table", table);
  check.tensor("sums", sums, ScalarType::Long, {4, u.size(0)});
  const int64_t tiles = u.size(0) / kTile, kept_size = tiles * (tiles + 1) / 2 * kTile * kTile;
  check.tensor("kept", kept, ScalarType::Half, {kept.numel() == 0 ? 0 : kept_size});
  check_aligned(check, "kept", kept);
  check.number("count", count, 0, u.size(0));
  on_device_of(u, "nt_xent_symmetric_sums", [&](void* stream) {
    return cuda::symmetric_sums(u.const_data_ptr(), data<int64_t>(table), count, u.size(0), u.size(1),
                                output<int64_t>(sums), output<void>(kept), static_cast<float>(scale), stream);
  });
}

// state: (2, splits, q_padded).
void nt_xent_row_sums(Tensor q, Tensor q_table, Tensor k, Tensor k_table, Tensor state, double scale, int64_t keys) {
  const Arguments check("nt_xent_row_sums", q);
  check_operand(check, "q", q, "q_table", q_table);
  check_operand(check, "k", k, "k_table", k_table, q.size(1));
  check.tensor("state", state, ScalarType::Float, {2, kAny, q.size(0)});
  check.number("keys", keys, 0, k.size(0));
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
  const Arguments check("nt_xent_panel_row_sums", panel);
  const bool wide = panel.scalar_type() == ScalarType::Double;
  check_panel(check, panel, wide ? ScalarType::Double : ScalarType::Float, q_table, k_table, first_row, first_key);
  check.tensor("state", state, panel.scalar_type(), {2, 1, padded_of(q_table)});
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
  const Arguments check("nt_xent_losses", q0);
  const CheckedRows queries = check_positives(check, q0, q1, k0, k1, positive, table, temperature, views);
  const ScalarType real = accumulator_of(queries.type);
  if (summed) {
    check.tensor("state", state, ScalarType::Long, {4, padded_of(table)});
  } else {
    check.tensor("state", state, real, {2, kAny, padded_of(table)});
  }
  check.tensor("loss", loss, real, {queries.count});
  on_device_of(q0, "nt_xent_losses", [&](void* stream) {
    return cuda::losses(positives(q0, q1, k0, k1, positive, table, temperature, views, normalize),
                        state.const_data_ptr(), summed, summed ? 1 : state.size(1), output<void>(loss), stream);
  });
}

void nt_xent_gradient_weights(Tensor q0, Tensor q1, Tensor k0, Tensor k1, Tensor positive, Tensor table, Tensor weight,
                              Tensor largest, Tensor loss, Tensor out, double temperature, bool views, bool bounded,
                              bool library, bool normalize) {
  const Arguments check("nt_xent_gradient_weights", q0);
  const CheckedRows queries = check_positives(check, q0, q1, k0, k1, positive, table, temperature, views);
  const ScalarType real = accumulator_of(queries.type);
  check.tensor("weight", weight, real, {queries.count});
  check.tensor("largest", largest, real, {1});
  check.tensor("loss", loss, real, {queries.count});
  check.tensor("out", out, real, {3, padded_of(table)});
  on_device_of(q0, "nt_xent_gradient_weights", [&](void* stream) {
    return cuda::gradient_weights(positives(q0, q1, k0, k1, positive, table, temperature, views, normalize),
                                  weight.const_data_ptr(), largest.const_data_ptr(), loss.const_data_ptr(), bounded,
                                  library, output<void>(out), stream);
  });
}

// out: (splits, q_padded, columns).
void nt_xent_stationary_gradient(Tensor q, Tensor q_table, Tensor q_weights, Tensor k, Tensor k_table, Tensor k_weights,
                                 Tensor out, double scale, int64_t keys, bool bounded, bool by_row, bool by_key) {
  const Arguments check("nt_xent_stationary_gradient", q);
  check_operand(check, "q", q, "q_table", q_table);
  check_operand(check, "k", k, "k_table", k_table, q.size(1));
  check_weights(check, "q_weights", q_weights, ScalarType::Float, q_table, by_row);
  check_weights(check, "k_weights", k_weights, ScalarType::Float, k_table, by_key);
  check.tensor("out", out, ScalarType::Float, {kAny, q.size(0), q.size(1)});
  check.number("keys", keys, 0, k.size(0));
  on_device_of(q, "nt_xent_stationary_gradient", [&](void* stream) {
    return cuda::stationary_gradient(operand(q, q_table, q_weights, by_row), operand(k, k_table, k_weights, by_key),
                                     q.size(1), keys, output<float>(out), out.size(0), static_cast<float>(scale),
                                     bounded, stream);
  });
}

void nt_xent_gradient_panel(Tensor q, Tensor q_table, Tensor q_weights, Tensor k, Tensor k_table, Tensor k_weights,
                            Tensor kept, Tensor panel, double scale, int64_t first_row, int64_t first_key,
                            int64_t source, bool bounded, bool by_row, bool by_key) {
  const Arguments check("nt_xent_gradient_panel", q);
  check.number("source", source, 0, std::size(ser_fast::kSourceNames) - 1);
  const auto from = static_cast<ser_fast::Source>(source);
  ScalarType real = ScalarType::Float;  // of the weights
  if (from == ser_fast::Source::library) {
    real = panel.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_panel(check, panel, real, q_table, k_table, first_row, first_key);
  } else {
    check_panel(check, panel, ScalarType::Half, q_table, k_table, first_row, first_key);
    check_operand(check, "q", q, "q_table", q_table);
    check_operand(check, "k", k, "k_table", k_table, q.size(1));
  }
  const bool is_kept = from == ser_fast::Source::kept || from == ser_fast::Source::kept_diagonal;
  check_weights(check, "q_weights", q_weights, real, q_table, by_row || is_kept);
  check_weights(check, "k_weights", k_weights, real, k_table, by_key || is_kept);
  if (is_kept) {
    const int64_t tiles = std::max(padded_of(q_table), padded_of(k_table)) / kTile;
    check.tensor("kept", kept, ScalarType::Half, {tiles * (tiles + 1) / 2 * kTile * kTile});
    check_aligned(check, "kept", kept);
    by_row = by_key = true;
  }
  on_device_of(q, "nt_xent_gradient_panel", [&](void* stream) {
    const cuda::Panel to = panel_at(panel, first_row, first_key);
    const PanelOperand rows = panel_operand(q_table, q_weights, by_row);
    const PanelOperand keys = panel_operand(k_table, k_weights, by_key);
    switch (from) {
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
  const Arguments check("nt_xent_finish_gradient", x0);
  const CheckedRows x = check_rows(check, "x0", x0, "x1", x1), y = check_rows(check, "y0", y0, "y1", y1);
  const ScalarType real = accumulator_of(x.type);
  check.number("side", side, 0, std::size(ser_fast::kSideNames) - 1);
  check.tensor("y0", y0, dtype_of(x.type), {kAny, x0.size(1)});
  const int64_t padded = check_table(check, "table", table, x.count);
  const auto of_side = static_cast<ser_fast::Side>(side);
  check.temperature(temperature);
  check.tensor("gradient_weights", weights, real, {3, kAny});
  check.number("gradient_weights (rows)", of_side == ser_fast::Side::key ? y.count : x.count, 0, weights.size(1));
  if (of_side == ser_fast::Side::views) {
    check.tensor("x1", x1, dtype_of(x.type), {x0.size(0), x0.size(1)});
    check.tensor("y0", y0, dtype_of(x.type), {x0.size(0), x0.size(1)});
    check.tensor("y1", y1, dtype_of(x.type), {x0.size(0), x0.size(1)});
  } else if (of_side == ser_fast::Side::query) {
    check.tensor("positive", positive, ScalarType::Long, {x.count});
    check.that(x.count == 0 || y.count > 0, "y0", "no rows", "at least one");
  } else {
    check.tensor("order", order, ScalarType::Long, {y.count});
    check.tensor("first", first, ScalarType::Long, {x.count + 1});
  }
  check.tensor("accumulated", accumulated, real, {kAny, padded, kAny});
  check.that(accumulated.size(2) >= x0.size(1) && accumulated.size(2) % kColumns == 0, "accumulated", "other columns",
             "x0's, in multiples of 64");
  check_aligned(check, "accumulated", accumulated);
  check.tensor("largest", largest, real, {1});
  const ScalarType d_type = d_x0.scalar_type() == dtype_of(x.type) ? dtype_of(x.type) : real;
  check.tensor("d_x0", d_x0, d_type, {x0.size(0), x0.size(1)});
  check.tensor("d_x1", d_x1, d_type, {x1.size(0), x0.size(1)});
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
  const Arguments check("nt_xent_detached_sums", q);
  check_operand(check, "q", q, "q_table", q_table);
  check_operand(check, "k", k, "k_table", k_table, q.size(1));
  check.tensor("out", out, ScalarType::Float, {kAny, q.size(0), q.size(1)});
  check.tensor("state", state, ScalarType::Float, {2, out.size(0), q.size(0)});
  check.number("keys", keys, 0, k.size(0));
  on_device_of(q, "nt_xent_detached_sums", [&](void* stream) {
    return cuda::detached_sums(operand(q, q_table, state, false), operand(k, k_table, state, false), q.size(1), keys,
                               output<float>(state), output<float>(out), out.size(0), static_cast<float>(scale),
                               bounded, stream);
  });
}

void nt_xent_finish_detached(Tensor query, Tensor key, Tensor positive, Tensor table, Tensor state, Tensor accumulated,
                             Tensor loss, Tensor gradient, double temperature, bool normalize) {
  const Arguments check("nt_xent_finish_detached", query);
  check.temperature(temperature);
  const Type type = check.floats("query", query, {kAny, kAny});
  check.that(ser_fast::bytes_of(type) == 2, "query", "more than 16 bits", "float16 or bfloat16");
  check.number("columns", query.size(1), 1, std::numeric_limits<int32_t>::max());
  check.tensor("key", key, dtype_of(type), {kAny, query.size(1)});
  check.that(query.size(0) == 0 || key.size(0) > 0, "key", "no keys", "at least one");
  check.tensor("positive", positive, ScalarType::Long, {query.size(0)});
  const int64_t padded = check_table(check, "table", table, query.size(0));
  check.tensor("accumulated", accumulated, ScalarType::Float, {kAny, padded, kAny});
  check.that(accumulated.size(2) >= query.size(1) && accumulated.size(2) % kColumns == 0, "accumulated",
             "other columns", "query's, in multiples of 64");
  check_aligned(check, "accumulated", accumulated);
  check.tensor("state", state, ScalarType::Float, {2, accumulated.size(0), padded});
  check.tensor("loss", loss, ScalarType::Float, {query.size(0)});
  check.tensor("gradient", gradient, ScalarType::Float, {query.size(0), query.size(1)});
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

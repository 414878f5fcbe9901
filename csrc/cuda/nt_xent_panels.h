// Panels of the similarity matrix of nt_xent and info_nce whose products the library computed, or the forward
// pass kept (ser_fast/ops has the mathematics).
//
// A panel is (rows, width) from the corner (first_row, first_key); all four are multiples of 128. The tables are those
// that `prepare` writes, and weights those of `gradient_weights`: null where a is 0. Panels and what was kept begin at
// multiples of 16 bytes. Pointers of the current device. All return what went wrong, or null; none waits for the
// device.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace ser_fast::cuda {

struct Panel {
  void* at;
  int64_t first_row, first_key, rows, width;
};

struct PanelOperand {
  const int64_t* table;
  const void* weights;  // (3, padded)
  int64_t padded;
};

// Takes the negatives of a panel of base-2 similarities into state (2, q.padded): a running maximum, and the sums of
// 2^(s - maximum). type: float32 or float64, of the panel, of state and of the weights.
const char* panel_row_sums(const Panel& panel, Type type, const PanelOperand& q, const PanelOperand& k, void* state,
                           void* stream);

// Similarities become G_ij = a_i 2^(s_ij - shift_i) + a_j 2^(s_ij - shift_j), 0 where j is no negative of i.
const char* gradient_panel_from_library(const Panel& panel, Type type, const PanelOperand& q, const PanelOperand& k,
                                        void* stream);

// panel float16 = G_ij = P_ij (a_i + a_j), from the 2^15 P that symmetric_sums kept. The weights are float.
const char* gradient_panel_from_kept(const Panel& panel, const void* kept, const PanelOperand& q, const PanelOperand& k,
                                     void* stream);

}  // namespace ser_fast::cuda

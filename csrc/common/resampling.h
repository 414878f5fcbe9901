// How the group action resamples, in the words of ser_fast/interpolation.py.
#pragma once

namespace ser_fast {

enum class Interpolation { nearest, bilinear, bicubic, catmull_rom, mitchell, lanczos3, area };
enum class Padding { zeros, border, reflection };
constexpr const char* kInterpolationNames[] = {"nearest",  "bilinear", "bicubic", "catmull_rom",
                                               "mitchell", "lanczos3", "area"};
constexpr const char* kPaddingNames[] = {"zeros", "border", "reflection"};

struct Resampling {
  Interpolation interpolation;
  Padding padding;
  bool antialias;
};

constexpr double kTolerance = 1e-4;         // LatticeMap's: this close to a border between two tokens is on it
constexpr double kLargest = 1e100;          // LatticeMap's: a map with a number beyond this, or a NaN, takes nothing
constexpr double kFarthest = 4294967296.0;  // LatticeMap's: a position farther out than this is as far
constexpr int kMostStretch = 16;  // a step longer than this many times the lattice is as long: taps are bounded

// A kernel of radius 1 or 2 as cubics in |t|, one for [0, 1) and one for [1, 2); the first coefficient is that of 1.
struct Cubics {
  double inner[4], outer[4];
};

// The (B, C) family of Mitchell and Netravali; (0, -a) is Keys' kernel with parameter a.
constexpr Cubics family(double b, double c) {
  return {{1 - b / 3, 0, -3 + 2 * b + c, 2 - 1.5 * b - c}, {4 * b / 3 + 4 * c, -2 * b - 8 * c, b + 5 * c, -b / 6 - c}};
}

constexpr Cubics cubics(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::bilinear: return {{1, -1, 0, 0}, {}};
    case Interpolation::bicubic: return family(0, 0.75);
    case Interpolation::catmull_rom: return family(0, 0.5);
    case Interpolation::mitchell: return family(1.0 / 3, 1.0 / 3);
    default: return {};
  }
}

// How far a token of weight may be.
constexpr double radius(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::nearest: return 0.5 + kTolerance;
    case Interpolation::bilinear: return 1;
    case Interpolation::lanczos3: return 3;
    default: return 2;
  }
}

}  // namespace ser_fast

// Runs csrc/cuda/embedding_sum.cuh on the CPU: `run FOLDER` reads the sizes and the tensors that tests/test_cuda.py put
// there, and writes what the kernels made of them. Every tensor has an allocation of its own, of its exact size.
#define CUDA_EMULATION
#include "embedding_sum.cuh"

#include <algorithm>
#include <fstream>
#include <map>
#include <numeric>
#include <string>

using namespace bertfast;
using Element = ELEMENT;

std::string folder;

template <typename T>
std::vector<T> read(const std::string& name) {
  std::ifstream file(folder + "/" + name, std::ios::binary | std::ios::ate);
  if (!file) emulation::fail(("no tensor " + name).c_str());
  std::vector<T> values(static_cast<size_t>(file.tellg()) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  return values;
}

template <typename T>
void write(const std::string& name, const std::vector<T>& values) {
  std::ofstream file(folder + "/" + name, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// The gradient of one table: added to what `name` holds already.
template <typename T>
void segment_gradient(const std::string& name, const std::vector<float>& rows, const std::vector<int64_t>* ids,
                      int64_t skipped, int64_t n, int n_columns) {
  std::vector<T> table = read<T>(name);
  const size_t n_cuts = static_cast<size_t>(cut_rows(n));
  std::vector<float> cuts(n_cuts * static_cast<size_t>(n_columns), NAN);
  std::vector<int64_t> cut_ids(n_cuts, INT64_MIN), order;
  if (ids) {
    order.resize(ids->size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (*ids)[a] < (*ids)[b]; });
  }
  segment_sum(table.data(), cuts.data(), cut_ids.data(), rows.data(), ids ? order.data() : nullptr,
              ids ? ids->data() : nullptr, skipped, n, n_columns, 0);
  write("new_" + name, table);
}

int main(int, char** arguments) {
  folder = arguments[1];
  std::map<std::string, double> number;
  std::ifstream numbers(folder + "/numbers");
  for (std::string name; numbers >> name;) numbers >> number[name];
  const int64_t T = static_cast<int64_t>(number["n_rows"]), n_blocks = static_cast<int64_t>(number["n_blocks"]);
  const int H = static_cast<int>(number["n_columns"]);
  const size_t size = static_cast<size_t>(T) * static_cast<size_t>(H);

  const auto input_ids = read<int64_t>("input_ids"), position_ids = read<int64_t>("position_ids"),
             token_type_ids = read<int64_t>("token_type_ids"), row_key = read<int64_t>("row_key"),
             seed = read<int64_t>("seed");
  const auto word = read<Element>("word"), position = read<Element>("position"),
             token_type = read<Element>("token_type"), weight = read<Element>("weight"), bias = read<Element>("bias"),
             dy = read<Element>("dy");
  const Ids ids{input_ids.data(), position_ids.data(), token_type_ids.data()};
  const Tables<Element> tables{word.data(), position.data(), token_type.data()};
  const Dropout dropout{number["p"] > 0 ? seed.data() : nullptr, number["has_key"] > 0 ? row_key.data() : nullptr,
                        static_cast<uint32_t>(number["threshold"]), static_cast<uint32_t>(number["stream"]),
                        static_cast<float>(number["scale"])};

  std::vector<Element> y(size);  // what is not written shows, here and below
  for (Element& value : y) from_float(NAN, value);
  std::vector<float> mean(static_cast<size_t>(T), NAN), rstd(static_cast<size_t>(T), NAN), dz(size, NAN);
  embedding_sum_fwd(y.data(), mean.data(), rstd.data(), ids, tables, weight.data(), bias.data(),
                    static_cast<float>(number["eps"]), dropout, T, H, 0);
  write("y", y), write("mean", mean), write("rstd", rstd);

  const int64_t groups = backward_groups<Element>(H, n_blocks);
  std::vector<float> dweight_parts(static_cast<size_t>(groups * H), NAN), dbias_parts(dweight_parts.size(), NAN);
  embedding_sum_bwd(dz.data(), dweight_parts.data(), dbias_parts.data(), dy.data(), ids, tables, weight.data(),
                    mean.data(), rstd.data(), dropout, T, H, n_blocks, 0);
  const int64_t padding = static_cast<int64_t>(number["padding_idx"]);
  if (number["float_sink"] > 0) {
    segment_gradient<float>("dword", dz, &input_ids, padding, T, H);
  } else {
    segment_gradient<Element>("dword", dz, &input_ids, padding, T, H);
  }
  segment_gradient<Element>("dposition", dz, &position_ids, NO_SEGMENT, T, H);
  segment_gradient<Element>("dtoken_type", dz, &token_type_ids, NO_SEGMENT, T, H);
  segment_gradient<Element>("dweight", dweight_parts, nullptr, NO_SEGMENT, groups, H);
  segment_gradient<Element>("dbias", dbias_parts, nullptr, NO_SEGMENT, groups, H);
}

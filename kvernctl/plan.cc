#include <fstream>
#include <ostream>
#include <utility>

#include "kvernctl/commands.h"
#include "plan/model_size.h"

namespace kvern {
namespace {

int fail(const Status& status, std::ostream& out) {
  out << "plan: " << status.message() << '\n';
  return 2;
}

}  // namespace

int run_plan(const std::string& trace_path, const std::string& model, plan::PlanOptions options,
             const std::string& chart_path, std::ostream& out) {
  const auto bytes_per_token = plan::kv_bytes_per_token(model);
  if (!bytes_per_token) return fail(bytes_per_token.error(), out);
  options.bytes_per_token = *bytes_per_token;
  const auto trace = plan::load_trace(trace_path);
  if (!trace) return fail(trace.error(), out);
  const auto made = plan::make_plan(*trace, options);
  if (!made) return fail(made.error(), out);
  out << plan::format_bytes(*bytes_per_token) << " of keys and values per token; ";
  plan::print_plan(*trace, *made, out);
  if (chart_path.empty()) return 0;
  std::ofstream chart(chart_path);
  plan::write_chart(*made, chart);
  chart.close();
  if (!chart) return fail({Code::kUnavailable, chart_path + " cannot be written"}, out);
  return 0;
}

}  // namespace kvern

#include <algorithm>
#include <array>
#include <cstdio>
#include <ostream>
#include <string>
#include <string_view>

#include "plan/planner.h"

namespace kvern::plan {
namespace {

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  std::array<char, 256> text{};
  std::snprintf(text.data(), text.size(), pattern, values...);
  return text.data();
}

std::string escaped(std::string_view text) {
  std::string safe;
  for (const char each : text) {
    switch (each) {
      case '<':
        safe += "&lt;";
        break;
      case '&':
        safe += "&amp;";
        break;
      default:
        safe += each;
    }
  }
  return safe;
}

double share(std::uint64_t tokens, std::uint64_t all) {
  return static_cast<double>(tokens) / static_cast<double>(std::max<std::uint64_t>(all, 1));
}

}  // namespace

void print_plan(const Trace& trace, const Plan& plan, std::ostream& out) {
  out << trace.requests.size() << " requests, " << trace.input_tokens << " prompt tokens, " << trace.distinct_blocks
      << " different blocks of " << trace.block_tokens << " tokens\n"
      << format("Everything computed: first token after %.3f s on average.\n\n", plan.first_token_seconds_without);
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const PlanRow& row = plan.rows[i];
    const ReplayReport& report = row.report;
    out << (i == plan.chosen ? "* " : "  ") << row.label() << '\n';
    out << format("    hits %5.1f %% of the tokens", 100 * report.hit_rate());
    for (const auto& tier : report.tiers) {
      out << format("; %s %.1f %%", tier.name.c_str(), 100 * share(tier.hit_tokens, report.prompt_tokens));
    }
    out << format("\n    first token after %.3f s on average, 95 %% within %.3f s; mean error of hits %.4f\n",
                  row.first_token_seconds, row.first_token_seconds_p95, report.mean_error);
    out << "    moved:";
    for (const auto& tier : report.tiers) {
      out << ' ' << tier.name << ' ' << format_bytes(tier.read_bytes) << " read, " << format_bytes(tier.written_bytes)
          << " written" << (&tier == &report.tiers.back() ? "\n" : ";");
    }
    if (report.rungs.size() > 1) {
      out << "    hits by form:";
      for (const auto& rung : report.rungs) {
        out << format(" %s %.1f %%%s", rung.codec_spec.c_str(), 100 * share(rung.hit_tokens, report.prompt_tokens),
                      &rung == &report.rungs.back() ? "\n" : ";");
      }
    }
  }
  const PlanRow& chosen = plan.rows[plan.chosen];
  out << "\nUse: " << chosen.label()
      << format(" (first token %.1f times as fast as without).\n",
                plan.first_token_seconds_without / chosen.first_token_seconds)
      << "It has the least DRAM, NVMe and error of all that come within 2 % of the fastest.\n";
}

void write_chart(const Plan& plan, std::ostream& out) {
  constexpr int kLabelWidth = 420;
  constexpr int kBarWidth = 480;
  constexpr int kRight = 150;
  constexpr int kRow = 26;
  constexpr int kTop = 56;
  constexpr std::array<const char*, 3> kColours = {"#2b6cb0", "#dd8a2e", "#6b9e4b"};
  const int width = kLabelWidth + kBarWidth + kRight;
  const int height = kTop + kRow * static_cast<int>(plan.rows.size()) + 20;
  out << format(
             "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" "
             "font-size=\"13\">\n",
             width, height)
      << "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
      << "<text x=\"10\" y=\"20\" font-size=\"15\">Prompt tokens found, by tier; mean time to first token</text>\n";
  const auto& tiers = plan.rows.front().report.tiers;
  for (std::size_t tier = 0; tier < tiers.size(); ++tier) {
    const int x = kLabelWidth + static_cast<int>(tier) * 110;
    out << format("<rect x=\"%d\" y=\"30\" width=\"12\" height=\"12\" fill=\"%s\"/>", x,
                  kColours[tier % kColours.size()])
        << format("<text x=\"%d\" y=\"41\">%s</text>\n", x + 18, escaped(tiers[tier].name).c_str());
  }
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const PlanRow& row = plan.rows[i];
    const int y = kTop + kRow * static_cast<int>(i);
    const bool is_chosen = i == plan.chosen;
    out << "<text x=\"" << kLabelWidth - 10 << "\" y=\"" << y + 15 << "\" text-anchor=\"end\""
        << (is_chosen ? " font-weight=\"bold\">" : ">") << escaped(row.label()) << "</text>\n";
    double x = kLabelWidth;
    for (std::size_t tier = 0; tier < row.report.tiers.size(); ++tier) {
      const double length = kBarWidth * share(row.report.tiers[tier].hit_tokens, row.report.prompt_tokens);
      out << format("<rect x=\"%.1f\" y=\"%d\" width=\"%.1f\" height=\"18\" fill=\"%s\"/>\n", x, y, length,
                    kColours[tier % kColours.size()]);
      x += length;
    }
    out << format("<text x=\"%.1f\" y=\"%d\">%.1f %%, %.2f s</text>\n", x + 6, y + 15, 100 * row.report.hit_rate(),
                  row.first_token_seconds);
  }
  out << "</svg>\n";
}

}  // namespace kvern::plan

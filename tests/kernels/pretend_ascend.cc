// Lets MindSpore's front end compile for a device whose plugin is not installed; see pretend_ascend.py.
#include <string>

namespace mindspore {
class MsContext {
 public:
  static void RegisterInitFunc(const std::string &name, void (*function)(MsContext *));
};
}  // namespace mindspore

static void nothing(mindspore::MsContext *) {}

extern "C" void pretend(const char *name) { mindspore::MsContext::RegisterInitFunc(name, nothing); }

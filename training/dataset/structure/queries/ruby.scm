(call !receiver method: (identifier) @_function arguments: (argument_list . (string (string_content) @require))
  (#any-of? @_function "require" "load"))
(call !receiver method: (identifier) @_function
  arguments: (argument_list . (string (string_content) @require.relative))
  (#eq? @_function "require_relative"))

(program [(class name: (_) @define) (module name: (_) @define) (method name: (_) @define)])
(program (module body: (body_statement [(class name: (_) @define) (module name: (_) @define)])))

(class body: (_)? @members) @signature
(module body: (_)? @members) @signature
(method body: (_)? @body) @signature
(singleton_method body: (_)? @body) @signature

[(if) (unless) (while) (until) (for) (case) (begin) (method) (singleton_method) (class) (module) (assignment)
 (operator_assignment) (return) (block) (do_block) (body_statement) (block_body) (then) (else) (elsif)
 (when) (rescue) (ensure) (argument_list) (if_modifier) (unless_modifier)] @span
(body_statement (call) @span)
(assignment right: (_) @span)

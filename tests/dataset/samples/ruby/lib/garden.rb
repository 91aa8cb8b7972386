require 'json'
require_relative 'garden/plant'
require 'garden/calendar'

module Garden
  def self.load(path)
    rows = JSON.parse(File.read(path))
    rows.map { |row| Plant.new(row['name'], row['days']) }
  end
end
